"""Read a configuration: YAML files with ``extends:``, then ``a.b=c`` overrides, then validation with kind errors."""

from __future__ import annotations

import reprlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from bgen.config.components import ChosenByName
from bgen.config.finetune import FinetuneConfig
from bgen.config.run import Config, RunConfig
from bgen.config.section import Section
from bgen.errors import UserError, nearest

Kind = TypeVar("Kind", bound=RunConfig)

MOST_BYTES, MOST_NODES, MOST_FILES = 1 << 20, 100_000, 30
"""Bytes and values of a configuration file, and files that extend one another, at most."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxlist = _repr.maxdict = 20

PACKAGED = Path(__file__).resolve().parent.parent / "configs"
"""Where an installed bgen keeps its configurations; a source checkout has them at its top level."""


def packaged_configs() -> Path:
    """Return the folder of the configurations that come with bgen."""
    return PACKAGED if PACKAGED.is_dir() else PACKAGED.parent.parent / "configs"


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """Return the YAML file called ``name``: a path, a path relative to ``beside``, or one of bgen's own.

    Raises
    ------
    UserError
        If there is no such file.
    """
    path = Path(name)
    places = [folder / path for folder in (beside, Path.cwd(), packaged_configs()) if folder is not None]
    for place in places:
        for candidate in (place, place.with_name(place.name + ".yaml")):
            if candidate.is_file():
                return candidate
    own = sorted(str(file.relative_to(packaged_configs()))[:-5] for file in packaged_configs().rglob("*.yaml"))
    raise UserError(f"There is no configuration file '{name}'.{nearest(str(name), own)}")


def load_config(
    name: str | Path, overrides: Sequence[str] = (), *, settings: Mapping[str, Any] | None = None
) -> Config:
    """Load, extend, override and validate the configuration of a training.

    Parameters
    ----------
    name
        YAML file, or the name of one that comes with bgen (``demo/vae``). Its key ``extends`` names one file or a list
        of files that it builds on; later ones win, mappings are merged, everything else is replaced.
    overrides
        ``section.key=value``; the value is read as YAML.
    settings
        Sections with their values, from Python; they win over all else.

    Raises
    ------
    UserError
        Naming the path of each wrong key or value and the nearest key.
    """
    return validate(_merge(_resolve(name, overrides), settings or {}), Config, source=str(name))


def load_finetune(name: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Load the configuration of a fine-tuning, as :func:`load_config` does that of a training."""
    return validate(_resolve(name, overrides), FinetuneConfig, source=str(name))


def load_either(name: str | Path, overrides: Sequence[str] = ()) -> Config | FinetuneConfig:
    """Load the configuration of a fine-tuning if it names a ``parent``, else that of a training."""
    tree = _resolve(name, overrides)
    if "parent" in tree:
        return validate(tree, FinetuneConfig, source=str(name))
    return validate(tree, Config, source=str(name))


def validate(tree: Mapping[str, Any], kind: type[Kind], source: str) -> Kind:
    """Turn a mapping into a configuration of a ``kind``, collecting all mistakes in one :class:`UserError`."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {_explain(item, kind, tree)}" for item in error.errors()]
        raise UserError(f"The configuration {source} is not valid:\n" + "\n".join(lines)) from None


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, which :func:`load_either` reads back to the same but for passwords."""
    tree = config.model_dump(mode="json")
    last = {name: tree.pop(name) for name in ("train", "track")}  # what all kinds share, as in the shipped files
    return yaml.safe_dump({**tree, **last}, sort_keys=False)


def _resolve(name: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = _read(find_config(name), (), {})
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    return tree


def _read(path: Path, seen: tuple[Path, ...], done: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Return what a file and those that it extends say; ``done`` holds the files that were read before."""
    here = path.resolve()
    if here in seen:
        raise UserError(f"{path} extends itself: {' -> '.join(str(p) for p in (*seen, here))}")
    if len(seen) >= MOST_FILES:
        raise UserError(f"{path}: more than {MOST_FILES} configurations extend one another.")
    if here in done:
        return done[here]
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes: it is no configuration.")
        tree = _load(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' pairs, not a {type(tree).__name__}.")
    bases = tree.pop("extends", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and "\0" not in base for base in bases):
        raise UserError(f"{path}: extends names a file or a list of files, not {reprlib.repr(bases)}.")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(find_config(base, path.parent), (*seen, here), done))
    done[here] = _merge(merged, tree)
    return done[here]


def _load(text: str, where: str) -> Any:
    """Read YAML whose aliases, written out, are not longer than :data:`MOST_NODES`.

    Raises
    ------
    UserError
        If it is not valid, nested too deeply, or too large.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            if _size(root, {}) > MOST_NODES:
                raise UserError(f"{where}: its aliases (&name, *name) stand for more than {MOST_NODES:,} values.")
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply.") from None
    except (ValueError, OverflowError) as error:  # a date or number that cannot be
        raise UserError(f"{where} is not valid YAML: {error}") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes a node has with its aliases written out; ``known`` holds nodes that were counted."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # of a node within itself
        parts = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    path, sign, value = text.partition("=")
    if not sign or not path.strip():
        raise UserError(f"'{text}' is not an override: write section.key=value, such as train.steps=500.")
    tree: Any = _load(value, f"The value of '{text}'")
    for key in reversed(path.strip().split(".")):
        tree = {key: tree}
    return typing.cast("dict[str, Any]", tree)


def _explain(item: Any, kind: type[RunConfig], tree: Mapping[str, Any]) -> str:
    """Say in one line what is wrong at which path of the configuration ``tree``."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section = _section(kind, item["loc"][:-1], tree)
        hint = nearest(str(item["loc"][-1]), [*section.model_fields, *section.component_sections()]) if section else ""
        return f"{path}: unknown key.{hint}"
    if item["type"] == "missing":
        return f"{path}: is needed and not set."
    message = item["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (it is {_repr.repr(item['input'])})" if path else message


def _section(kind: type[RunConfig], loc: Sequence[int | str], tree: Any) -> type[Section] | None:
    """Return the section of a configuration of a ``kind``, ``tree``, at ``loc``."""
    section: type[Section] | None = kind
    for part in loc:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
        section = None if section is None else _part(section, str(part), tree)
    return section


def _part(section: type[Section], key: str, given: Any) -> type[Section] | None:
    """Return the section that a section has under ``key``, where ``given`` stands; None: there is no section."""
    field = section.model_fields.get(key)
    if field is None:
        return section.component_sections().get(key)
    for mark in field.metadata:
        if isinstance(mark, ChosenByName):
            return mark.section(given)
    kinds = typing.get_args(field.annotation) or (field.annotation,)  # those of a union: a section or None
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def stage_overrides(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Sort ``vae.section.key=value`` and ``flow.section.key=value`` by stage.

    Raises
    ------
    UserError
        If one is of neither.
    """
    given: dict[str, list[str]] = {"vae": [], "flow": []}
    for text in overrides:
        stage, _, rest = text.partition(".")
        if stage not in given:
            raise UserError(
                f"'{text}': write vae.train.steps=500 or flow.train.steps=500, for one of the two trainings."
            )
        given[stage].append(rest)
    return given
