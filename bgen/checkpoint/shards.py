"""The tensors of a checkpoint: one safetensors file per rank, readable at any number of ranks and ZeRO stage.

The ZeRO stage decides how a parameter is split among ranks. Each rank writes the pieces that it keeps under the name
``KIND/START/NAME``: elements of the flattened parameter ``NAME`` from ``START`` on. A reader takes the elements it
wants from whichever pieces hold them. Kinds:

- ``weight``: trained parameters in float32; ``average``: their moving average; ``best``: the best so far.
- ``optimizer.X``: the optimiser's state ``X``; ``step/START/NAME`` is its step counter for the piece.
- ``fixed``: buffers and frozen parameters, whole, in their own type; ``best-fixed``: the buffers beside ``best``.

Frozen parameters never change: they have a file of their own, which the checkpoints of a run share by
hard links.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

WEIGHT, AVERAGE, BEST, STEP, FIXED, BEST_FIXED = "weight", "average", "best", "step", "fixed", "best-fixed"
OPTIMIZER = "optimizer."
FROZEN = "frozen.safetensors"
"""Name of the file of the frozen parameters."""

# Bytes handed to the operating system at a time; both that and hashing let other threads run meanwhile.
CHUNK = 1 << 22

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def key(kind: str, start: int, name: str) -> str:
    """Name under which elements of ``name`` from ``start`` on are stored."""
    return f"{kind}/{start}/{name}"


def file_name(rank: int) -> str:
    """Name of a rank's file in the checkpoint folder."""
    return f"shard_{rank:05d}.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]]) -> dict[str, Any]:
    """Write CPU tensors, wait until they are on the disk, and return the file's size and SHA-256.

    The safetensors library would hold the interpreter lock for the whole file, and so stop the training loop.

    Parameters
    ----------
    path
        File to write.
    tensors
        By :func:`key`.
    shapes
        Shapes of the whole parameters, by name.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as stream:
        for part in _parts(tensors, shapes):
            digest.update(part)
            while part:
                part = part[stream.write(part) :]
        os.fsync(stream.fileno())
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def digest_of(tensors: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]]) -> str:
    """Return the SHA-256 of the file that :func:`write` would write."""
    digest = hashlib.sha256()
    for part in _parts(tensors, shapes):
        digest.update(part)
    return digest.hexdigest()


def _parts(tensors: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]]) -> Iterator[memoryview]:
    """Yield the bytes of a file, :data:`CHUNK` at a time."""
    header: dict[str, Any] = {"__metadata__": {"shapes": json.dumps({name: list(s) for name, s in shapes.items()})}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = memoryview(len(text).to_bytes(8, "little") + text)
    for block in (head, *(_bytes(tensor) for tensor in tensors.values())):
        for begin in range(0, len(block), CHUNK):
            yield block[begin : begin + CHUNK]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data


class Shards:
    """Reads the shards of one checkpoint.

    Parameters
    ----------
    folder
        The checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: set[str] = set()
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in sorted([*folder.glob("shard_*.safetensors"), *folder.glob(FROZEN)]):
            handle = safe_open(path, "pt")
            shapes = json.loads(handle.metadata()["shapes"])
            self.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
            for entry in handle.keys():  # noqa: SIM118  (it is not a mapping)
                kind, start, name = entry.split("/", 2)
                size = 1
                for extent in handle.get_slice(entry).get_shape():
                    size *= extent
                self.kinds.add(kind)
                self._pieces.setdefault((kind, name), []).append((int(start), size, handle, entry))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def names(self, kind: str) -> list[str]:
        """Names of the parameters (or buffers) that have something of a kind."""
        return [name for found, name in self._pieces if found == kind]

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements ``start`` to ``start + count`` of a flattened parameter, in float32.

        Raises
        ------
        KeyError
            If the checkpoint does not hold all of them.
        """
        found = torch.empty(count)
        filled = start
        for begin, size, handle, entry in self._pieces.get((kind, name), []):
            stop = min(begin + size, start + count)
            if begin <= filled < stop:
                found[filled - start : stop - start] = handle.get_slice(entry)[filled - begin : stop - begin]
                filled = stop
        if filled < start + count:
            raise KeyError(f"{kind} of {name}: elements from {filled} on")
        return found

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its shape; a fixed tensor as it was."""
        if kind in (FIXED, BEST_FIXED):
            _, _, handle, entry = self._pieces[kind, name][0]
            tensor: Tensor = handle.get_tensor(entry)
            return tensor
        shape = self.shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).reshape(shape)

    def step(self, name: str) -> float:
        """The optimiser's step counter of a parameter; 0 if it has not been updated yet."""
        pieces = self._pieces.get((STEP, name), [])
        return max((float(handle.get_tensor(entry)) for _, _, handle, entry in pieces), default=0.0)

    def export(self) -> dict[str, Tensor]:
        """The state dict to export: the best weights where the run keeps them, else the average, else the last.

        What else ``best-fixed`` holds is left out: first runs kept buffers there that follow from the settings.
        """
        kind = next(kind for kind in (BEST, AVERAGE, WEIGHT) if kind in self.kinds)
        beside_best = set(self.names(BEST_FIXED)) if kind == BEST else set()
        state = {name: self.whole(BEST_FIXED if name in beside_best else FIXED, name) for name in self.names(FIXED)}
        return state | {name: self.whole(kind, name) for name in self.names(kind)}
