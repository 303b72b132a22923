"""Open anything that holds counts: a store, its WebDataset form, or AnnData in zarr; here or at an address."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bgen.config.data import Access, DataConfig
from bgen.store.anndata_store import CsrStore, members
from bgen.store.format.manifest import NAME, Manifest, check_files, read_manifest
from bgen.store.remote import Mirror, RemoteFiles, RemoteStore, is_remote
from bgen.store.store import Store
from bgen.store.webdataset_store import INDEX, TarStore

FILES = (".h5ad", ".h5mu", ".h5", ".zarr", ".parquet")
"""How addresses end that are of cells and no store; others are asked for a manifest."""


def open_store(
    where: str | os.PathLike[str],
    *,
    threads: int = 2,
    access: Access | None = None,
    roles: Mapping[str, str] | None = None,
    splits: Mapping[str, float] | None = None,
    split_by: str | None = None,
    held_out: Mapping[str, Sequence[str]] | None = None,
    matrix: str = "X",
    control: str | None = None,
    seed: int = 0,
) -> Store:
    """Open a store of any form.

    Parameters
    ----------
    where
        Folder, or address (``s3://``, ``gs://``, ``http://``, ``https://``) of a store.
    threads
        Threads that decode.
    access
        How an address is read, and the cache folder.
    roles, splits, split_by, held_out, matrix, control, seed
        For AnnData in zarr, which says none of it (see :class:`bgen.store.anndata_store.CsrStore`); a store has its
        own.

    Raises
    ------
    UserError
        If there is none, or it cannot be read.
    """
    if is_remote(address := os.fspath(where)):
        files = RemoteFiles(address, access or Access())
        return TarStore(address, access) if files.exists(INDEX) else RemoteStore(address, access)
    folder = Path(where)
    if (folder / NAME).is_file():
        kind = TarStore if (folder / INDEX).is_file() else Store
        return kind(folder, threads=threads, access=access)
    groups = members(folder)
    if any((group / name).is_file() for group in groups for name in ("zarr.json", ".zgroup")):
        return CsrStore(
            folder,
            matrix=matrix,
            roles=roles,
            splits=splits,
            split_by=split_by,
            held_out=held_out,
            control=control,
            seed=seed,
            threads=threads,
        )
    return Store(folder, threads=threads)


def is_store(where: str | os.PathLike[str], access: Access | None = None) -> bool:
    """Whether there is a store, or its WebDataset form, in a folder or at an address.

    Raises
    ------
    UserError
        If that cannot be found out.
    """
    if is_remote(address := os.fspath(where)):
        return not address.endswith(FILES) and RemoteFiles(address, access or Access()).exists(NAME)
    return (Path(where) / NAME).is_file()


def open_manifest(where: str | Path, access: Access | None = None) -> Manifest:
    """Return the manifest of a store in a folder or at an address; nothing else of it is read.

    Raises
    ------
    UserError
        If there is none, or it cannot be read.
    """
    if is_remote(where):
        return Mirror(RemoteFiles(str(where), access or Access())).manifest
    return read_manifest(Path(where))


def find_damaged_files(where: str | Path, access: Access | None = None) -> list[str]:
    """Read every byte of a store, also at an address, and describe the files that are not as they were written.

    Raises
    ------
    UserError
        If there is no store, or its manifest cannot be read.
    """
    if is_remote(where):
        files = RemoteFiles(str(where), access or Access())
        store = TarStore(str(where), access) if files.exists(INDEX) else RemoteStore(str(where), access)
        return store.find_damaged_files()
    manifest = read_manifest(Path(where))
    if (Path(where) / INDEX).is_file():
        return TarStore(where).find_damaged_files()
    return check_files(Path(where), manifest, checksums=True)


def open_data(config: DataConfig) -> Store:
    """Open the store that a configuration names, as it says.

    Raises
    ------
    UserError
        As :func:`open_store`.
    """
    given = config.anndata
    return open_store(
        config.store,
        threads=config.threads,
        access=config.access,
        roles=given.roles,
        splits=given.splits,
        split_by=given.split_by,
        held_out=given.held_out,
        matrix=given.matrix,
        control=given.control,
        seed=given.seed,
    )
