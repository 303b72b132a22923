"""AnnData in zarr, version 2 or 3, sharded or not, and collections of it as annbatch writes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata import AnnData

from bgen.errors import UserError
from bgen.store.format.zarr_metadata import require_safe, require_whole
from bgen.store.format.zarr_texts import bounded_texts
from data_tools.inputs.source import Matrix, Source


@dataclass
class AnnDataZarrSource(Source):
    """A folder of AnnData in zarr."""

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        try:
            item = cast("Any", zarr.open_group(self.path, mode="r"))[name]
            yield from self._stored_rows(item, name, step, start, stop)
        except (ValueError, KeyError) as error:  # how zarr says that a chunk is damaged
            raise UserError(f"{self.path}: '{name}' cannot be read ({error}). Is it damaged?") from error

    def _everything(self) -> AnnData:
        require_safe(self.path, ("",))
        with bounded_texts():
            return anndata.read_zarr(self.path)


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr group."""
    return (path / "zarr.json").is_file() or (path / ".zgroup").is_file()


def members_of_zarr(path: Path) -> list[Path]:
    """Return the AnnData groups that a zarr group holds; an AnnData group holds itself."""
    if is_zarr(path / "obs"):
        return [path]
    found = [child for child in path.iterdir() if child.is_dir() and is_zarr(child / "obs")]
    # dataset_10 comes after dataset_9
    return sorted(found, key=lambda child: (len(child.name), child.name)) or [path]


def open_zarr(path: Path) -> AnnDataZarrSource:
    """Open AnnData in zarr without reading its matrices.

    Raises
    ------
    UserError
        If it is damaged, or not AnnData.
    """
    try:
        with warnings.catch_warnings(), bounded_texts():
            warnings.simplefilter("ignore")  # anndata's and zarr's remarks about stores that older versions wrote
            require_safe(path)
            group: Any = zarr.open_group(path, mode="r")
            if "obs" not in group or "var" not in group:
                raise UserError(f"{path}: a zarr group, but not AnnData: it has no obs and var.")
            obs, var = (_read_frame(group[name]) for name in ("obs", "var"))
            names = [name for name in ("X", "raw/X") if name in group]
            names += [f"layers/{name}" for name in sorted(group["layers"].keys())] if "layers" in group else []
            variables = dict.fromkeys(names, var)
            if "raw/var" in group and "raw/X" in names:
                variables["raw/X"] = _read_frame(group["raw/var"])
            matrices = {name: _describe(path, name, group[name]) for name in names}
            uns = {}
            for key, item in group["uns"].members() if "uns" in group else ():
                if isinstance(item, zarr.Array) and item.shape == ():
                    value = anndata.io.read_elem(item)
                    uns[key] = value.item() if isinstance(value, np.generic) else value
    except (OSError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as AnnData in zarr ({error}). Is it damaged?") from error
    known = {name: about for name, about in matrices.items() if about}
    return AnnDataZarrSource(path, "anndata zarr", obs, variables, known, uns)


def _read_frame(item: Any) -> pd.DataFrame:
    frame = anndata.io.read_elem(item)
    frame.index = frame.index.astype(str)
    return frame


def _describe(path: Path, name: str, item: Any) -> Matrix | None:
    if isinstance(item, zarr.Array):
        return Matrix(item.shape, item.dtype, "dense", -1) if len(item.shape) == 2 else None
    if "indptr" not in item:
        return None
    require_whole(path / name)
    values = anndata.io.sparse_dataset(item)
    rows, columns = values.shape
    return Matrix((int(rows), int(columns)), values.dtype, values.format, int(item["data"].shape[0]))
