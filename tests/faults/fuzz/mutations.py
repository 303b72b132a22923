"""Damage to files and command lines, drawn from a generator: the same seed gives the same damage."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

Rng = np.random.Generator

HOSTILE: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    10_000_000,
    2**31,
    2**63,
    10**30,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "../../planted",
    "/planted",
    "a/b",
    ".",
    "[/x] [bold]",
    "\x1b]0;title\x07",
    "n" * 300,
    "ä\u202e\U0001f9ec",
    [],
    [[1]],
    [1, "a", None],
    {},
    {"a": {"b": []}},
]
"""Values that no file should hold where they are put."""

TEXTS = [value for value in HOSTILE if isinstance(value, str)]


def pick(rng: Rng, values: list[Any]) -> Any:
    """Return one of the values."""
    return values[int(rng.integers(len(values)))]


def damage_bytes(path: Path, rng: Rng) -> str:
    """Flip, cut, repeat or replace bytes of a file."""
    content = bytearray(path.read_bytes())
    way = pick(rng, ["flip", "cut", "empty", "grow", "zeros", "noise"])
    at = int(rng.integers(max(len(content), 1)))
    if way == "flip" and content:
        for place in rng.integers(len(content), size=int(rng.integers(1, 4))):
            content[place] ^= 1 << int(rng.integers(8))
    elif way == "cut":
        content = content[:at]
    elif way == "empty":
        content = bytearray()
    elif way == "grow":
        content += content[at : at + 4096] or b"\0"
    else:
        length = min(len(content) - at, int(rng.integers(1, 64)))
        content[at : at + length] = bytes(length) if way == "zeros" else rng.bytes(length)
    path.write_bytes(bytes(content))
    return f"{way} in {path.name}"


def replace_file(path: Path, rng: Rng) -> str:
    """Put something else where a file is: nothing, a folder, a link to nowhere, a file that is not for this user."""
    way = pick(rng, ["gone", "folder", "link", "loop"])
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "link":
        path.symlink_to("nowhere")
    elif way == "loop":
        path.symlink_to(path.name)
    return f"{path.name} is {way}"


def places(tree: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the ways to every value of a tree of dicts and lists."""
    found = [way] if way else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += places(value, (*way, key))
    elif isinstance(tree, list):
        for place, value in enumerate(tree[:20]):
            found += places(value, (*way, place))
    return found


def mutate_tree(tree: Any, rng: Rng) -> str:
    """Change one value of a tree in place."""
    way = pick(rng, places(tree))
    parent = tree
    for step in way[:-1]:
        parent = parent[step]
    how = pick(rng, ["value", "value", "value", "near", "drop", "add", "rename"])
    old = parent[way[-1]]
    if how == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[way[-1]] = pick(rng, [old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old)])
    elif how == "drop":
        del parent[way[-1]]
    elif how == "add" and isinstance(parent, list):
        parent.append(copy.deepcopy(old))
    elif how == "add":
        parent[pick(rng, TEXTS)] = copy.deepcopy(old)
    elif how == "rename" and isinstance(parent, dict):
        parent[pick(rng, TEXTS)] = parent.pop(way[-1])
    else:
        parent[way[-1]] = pick(rng, HOSTILE)
    return f"{how} at {way}"


def mutate_json(path: Path, rng: Rng) -> str:
    """Change one to three values of a JSON file."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    said = []
    for _ in range(int(rng.integers(1, 4))):
        if places(tree):
            said.append(mutate_tree(tree, rng))
    path.write_text(json.dumps(tree), encoding="utf-8")
    return f"{path.name}: {'; '.join(said)}"


def mutate_table(path: Path, rng: Rng) -> str:
    """Change lines of a CSV file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    way = pick(rng, ["drop", "repeat", "cell", "swap", "header", "wide"])
    at = int(rng.integers(1, len(lines)))
    if way == "drop":
        del lines[at]
    elif way == "repeat":
        lines.insert(at, lines[at])
    elif way == "cell":
        lines[at] = f"{pick(rng, TEXTS)},{lines[at].split(',', 1)[-1]}"
    elif way == "swap":
        lines[at], lines[1] = lines[1], lines[at]
    elif way == "header":
        lines[0] = pick(rng, TEXTS)
    else:
        lines[at] += ",x,y"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{way} at line {at} of {path.name}"


def mutate_safetensors(path: Path, rng: Rng) -> str:
    """Change what the header of a safetensors file says."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    said = mutate_tree(tree, rng)
    header = json.dumps(tree).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return f"header of {path.name}: {said}"


def any_file(folder: Path, rng: Rng) -> str:
    """Damage any file of a folder in a way that suits it."""
    path = pick(rng, sorted(path for path in folder.rglob("*") if path.is_file()))
    ways: list[Callable[[Path, Rng], str]] = [damage_bytes, replace_file]
    if path.suffix == ".json":
        ways += [mutate_json] * 6
    if path.suffix == ".csv":
        ways += [mutate_table] * 4
    if path.suffix == ".safetensors":
        ways += [mutate_safetensors] * 4
    return pick(rng, ways)(path, rng)


def hostile_array(array: Any, rng: Rng) -> np.ndarray:
    """Return an array like this one with what its reader does not expect."""
    found = np.asarray(array)
    way = pick(rng, ["value", "short", "long", "type", "empty", "deep", "order"])
    if way == "value" and found.size:
        flat = found.ravel().copy()
        if found.dtype.kind in "iu":
            low, high = np.iinfo(found.dtype).min, np.iinfo(found.dtype).max
            flat[rng.integers(flat.size, size=3)] = pick(rng, [low, high, low // 2, high // 2])
        elif found.dtype.kind == "f":
            flat[rng.integers(flat.size, size=3)] = pick(rng, [np.nan, np.inf, -np.inf, -1.0, 1e30, 0.5, 5e9])
        else:
            flat[int(rng.integers(flat.size))] = pick(rng, TEXTS).encode() if found.dtype.kind == "S" else "a/b"
        return flat.reshape(found.shape)
    if way == "short":
        return found[: len(found) // 2]
    if way == "long":
        return np.concatenate([found, found])
    if way == "type":
        kind = pick(rng, ["f4", "i1", "i8", "u1", "f2", ">i4", ">f8", "?", "c8"])
        return found.astype(kind) if found.dtype.kind in "iufb" else np.arange(found.size).astype(kind)
    if way == "empty":
        return found[:0]
    if way == "deep":
        return found.reshape(1, *found.shape)
    return found[::-1].copy()


def mutate_h5(path: Path, rng: Rng) -> str:
    """Change what an HDF5 file holds, or its bytes."""
    if rng.random() < 0.15:
        return damage_bytes(path, rng)
    with h5py.File(path, "a") as file:
        names: list[str] = []
        file.visit(names.append)
        name = pick(rng, names)
        item = file[name]
        way = pick(rng, ["array", "array", "array", "attribute", "drop", "move", "group", "link"])
        if way == "attribute" and len(item.attrs):
            key = pick(rng, list(item.attrs))
            if rng.random() < 0.3:
                del item.attrs[key]
            else:
                value = item.attrs[key]
                changed = (
                    pick(rng, TEXTS) if isinstance(value, str) else pick(rng, [0, -1, 2**40, "x", [5, 1], [1, 2**50]])
                )
                item.attrs[key] = changed
            return f"attribute {key} of {name}"
        if way == "array" and isinstance(item, h5py.Dataset) and item.shape:
            values = hostile_array(item[()], rng)
            attributes = dict(item.attrs)
            del file[name]
            if values.dtype.kind in "OU":
                made = file.create_dataset(name, data=values.astype(object), dtype=h5py.string_dtype())
            else:
                made = file.create_dataset(name, data=values)
            made.attrs.update(attributes)
            return f"array {name} becomes {values.shape} of {values.dtype}"
        if way == "move":
            file.move(name, f"{name}{pick(rng, ['2', 'a b', ' ', '[x]'])}")
        elif way == "group":
            del file[name]
            file.create_group(name)
        elif way == "link":
            del file[name]
            file[name] = pick(
                rng, [h5py.ExternalLink("/etc/hostname", "/X"), h5py.SoftLink(f"/{name}"), h5py.SoftLink("/obs")]
            )
        else:
            del file[name]
        return f"{way} {name}"


def mutate_zarr(folder: Path, rng: Rng) -> str:
    """Change what an AnnData in zarr holds: an array, its metadata, or any file."""
    if rng.random() < 0.5:
        return any_file(folder, rng)
    group = zarr.open_group(folder, mode="a")
    names = sorted(name for name, item in group.members(max_depth=None) if isinstance(item, zarr.Array) and item.ndim)
    name = pick(rng, names)
    old = group[name]
    values = hostile_array(old[...], rng)
    attributes = dict(old.attrs)
    kind = str if values.dtype.kind in "OUT" else values.dtype
    made = group.create_array(name, shape=values.shape, dtype=kind, overwrite=True)
    made[...] = values.astype(object) if kind is str else values
    made.attrs.update(attributes)
    return f"array {name} becomes {values.shape} of {values.dtype}"
