"""HDF5 files that others wrote: what is looked at before anything reads them.

An HDF5 file can name other files as the place of its values, and a few bytes of it can promise any number of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from bgen.errors import UserError
from bgen.store.format.zarr_metadata import TEXT_BYTES, require_chunk, require_modest


@contextmanager
def open_hdf5(path: Path, read_whole: tuple[str, ...] = ()) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, once it is known that it stands by itself.

    Parameters
    ----------
    read_whole
        Groups and datasets that are read whole; "" is everything. The ``indptr`` of a sparse matrix always is.

    Raises
    ------
    UserError
        If values lie in other files (external links, external or virtual storage), a chunk is larger than bgen decodes
        at once, or what is read whole takes far more memory than the file explains.
    OSError
        If it is no HDF5 file, or damaged.
    """
    with h5py.File(path, "r") as file:
        wanted = stored = 0
        for name, dataset in _datasets(path, file):
            plan = dataset.get_create_plist()
            if plan.get_external_count() or plan.get_layout() == h5py.h5d.VIRTUAL:
                raise _elsewhere(path, name)
            kind = dataset.get_type()
            itemsize = TEXT_BYTES if kind.get_class() == h5py.h5t.VLEN or _is_text(kind) else kind.get_size()
            if plan.get_layout() == h5py.h5d.CHUNKED:
                require_chunk(f"{path}: {name}", math.prod(plan.get_chunk()) * kind.get_size())
            if name.endswith("/indptr") or any(not part or name.startswith(part) for part in read_whole):
                wanted += math.prod(dataset.shape) * itemsize
                stored += dataset.get_storage_size()
        require_modest(path, wanted, stored)
        yield file


def _datasets(path: Path, file: h5py.File) -> Iterator[tuple[str, h5py.h5d.DatasetID]]:
    """Yield the name of every dataset and its handle."""
    links: list[tuple[bytes, int]] = []
    file.id.links.visit(lambda name, info: links.append((name, info.type)), info=True)
    for name, kind in links:
        if kind not in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT):
            raise _elsewhere(path, name.decode(errors="replace"))
        if kind == h5py.h5l.TYPE_HARD:
            found = h5py.h5o.open(file.id, name)
            if isinstance(found, h5py.h5d.DatasetID):
                yield name.decode(errors="replace"), found


def _is_text(kind: h5py.h5t.TypeID) -> bool:
    return isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()


def _elsewhere(path: Path, name: str) -> UserError:
    return UserError(
        f"{path}: the values of '{name}' lie in another file. bgen reads only what is in the file itself: write it"
        " again, without external links, external or virtual storage."
    )
