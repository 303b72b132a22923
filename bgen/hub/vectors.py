"""``gene_vectors.safetensors`` of a model directory: how vectors of genes are made that the model was not trained on.

There only if the model knows genes by vectors. For the encoder and for the decoder that has some it holds the vectors
of names beyond the model's genes, in half precision, and the linear map of each source; see
:mod:`bgen.genes.vector_map`. Names and files stand in the metadata, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from safetensors import safe_open
from safetensors.numpy import save_file

from bgen.genes.vector_map import VectorMap, VectorSource

FILE = "gene_vectors.safetensors"
_KEY = "bgen"


class _SourceNames(BaseModel):
    name: str
    sets: tuple[str, ...] | None


class _MapNames(BaseModel):
    sources: list[_SourceNames]
    others: tuple[str, ...]


class _Names(BaseModel):
    maps: dict[str, _MapNames]


def write_maps(maps: Mapping[str, VectorMap], folder: Path) -> None:
    """Write the maps of the halves of a VAE; nothing if there is none."""
    if not maps:
        return
    tensors: dict[str, NDArray[Any]] = {}
    names = _Names(maps={})
    for half, of in maps.items():
        tensors[f"{half}.others"] = of.values
        for number, source in enumerate(of.sources):
            tensors[f"{half}.{number}.axes"], tensors[f"{half}.{number}.offset"] = source.axes, source.offset
        sources = [_SourceNames(name=source.name, sets=source.sets) for source in of.sources]
        names.maps[half] = _MapNames(sources=sources, others=of.others)
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(whole, folder / FILE, {_KEY: names.model_dump_json()})


def read_maps(folder: Path, sizes: Mapping[str, int]) -> dict[str, VectorMap]:
    """Read the maps of the halves of a VAE, whose vectors have ``sizes``; none if there is no file.

    Raises
    ------
    ValueError
        If it does not hold what it should.
    """
    if not (folder / FILE).is_file():
        return {}
    maps = {}
    with safe_open(folder / FILE, framework="np") as file:
        names = _Names.model_validate(json.loads((file.metadata() or {}).get(_KEY, "")))
        for half, told in names.maps.items():
            if half not in sizes:
                raise ValueError(f"{FILE} is of vectors that the {half} does not have")
            size = sizes[half]
            sources = []
            for number, source in enumerate(told.sources):
                axes = _read(file, f"{half}.{number}.axes", np.float32, (-1, size))
                offset = _read(file, f"{half}.{number}.offset", np.float32, (size,))
                if source.sets is not None and len(source.sets) != len(axes):
                    raise ValueError(f"{FILE} has not as many names of gene sets as rows for them")
                sources.append(VectorSource(source.name, source.sets, axes, offset))
            values = _read(file, f"{half}.others", np.float16, (len(told.others), size))
            maps[half] = VectorMap(tuple(sources), told.others, values)
    return maps


def _read(file: Any, name: str, kind: type, shape: tuple[int, ...]) -> Any:
    """Return a tensor of a type and shape (-1: any), with finite numbers."""
    values = file.get_tensor(name)
    fits = values.ndim == len(shape) and all(
        want in (-1, there) for want, there in zip(shape, values.shape, strict=True)
    )
    if values.dtype != kind or not fits or not np.isfinite(values).all():
        raise ValueError(f"{FILE}: {name} is not what it should be")
    return values
