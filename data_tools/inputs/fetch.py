"""Inputs at addresses (``s3://``, ``gs://``, ``https://``): copied to this machine once, then read like any other.

HDF5 is read in thousands of small pieces, and a check and a build read every file twice, so the whole of it is copied,
in large pieces and several at a time. Copies lie in the folder for stores at addresses (``data.access.cache``), one for
each version of a file, and stay there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from bgen.config.data import Access
from bgen.errors import Unreachable, UserError
from bgen.files import sync_file, whole
from bgen.names import shown
from bgen.store.remote import RemoteFiles, is_remote

PIECE = 16 << 20
"""Bytes that are asked for at once."""

FOLDERS = (".zarr", ".zarr/")
"""How the name of a folder ends; anything else is a file."""


def on_this_machine(where: str | os.PathLike[str], access: Access | None = None) -> Path:
    """Return where an input lies on this machine: a path as it is, an address as a copy.

    Raises
    ------
    UserError
        If there is nothing at the address, or it is of a kind that bgen does not read;
        :class:`bgen.errors.Unreachable` if it cannot be reached.
    """
    text = os.fspath(where)
    if not is_remote(text):
        if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text):
            raise UserError(f"{shown(text)}: bgen reads s3://, gs://, http:// and https://, not {scheme[1]}://.")
        return Path(where)
    access = access or Access()
    url = text.rstrip("/")
    parent, _, name = url.rpartition("/")
    try:
        return _folder(url, name, access) if text.endswith(FOLDERS) else _file(url, parent, name, access)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise Unreachable(str(error)) from None


def _file(url: str, parent: str, name: str, access: Access) -> Path:
    """Return the copy of a file."""
    files = RemoteFiles(parent, access)
    try:
        version = files.version(name)
    except ValueError as error:
        raise UserError(f"{url}: there is no store and no file of that name ({error}).") from None
    place = _place(access, url, version) / name
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole(place) as half:
            _copy(files, name, half)
    return place


def _folder(url: str, name: str, access: Access) -> Path:
    """Return the copy of a folder of many files."""
    files = RemoteFiles(url, access)
    try:
        names = files.names()
    except ValueError:
        raise UserError(
            f"{url}: a folder at an http address cannot be listed. Copy it, or take s3:// or gs://."
        ) from None
    if not names:
        raise UserError(f"{url}: there is nothing.")
    with ThreadPoolExecutor(access.threads) as pool:
        versions = list(pool.map(files.version, names))
        place = _place(access, url, b"\n".join([*(name.encode() for name in names), *versions])) / name
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            with _first(place) as half:
                targets = [half / one for one in names]
                for target in targets:
                    if half.resolve() not in target.resolve().parents:
                        raise UserError(f"{url}: the name {shown(target.name)} leads out of the folder.")
                    target.parent.mkdir(parents=True, exist_ok=True)
                list(pool.map(_copy, [files] * len(names), names, targets))
    return place


@contextmanager
def _first(place: Path) -> Iterator[Path]:
    """Give a place to write a folder; of several processes that do so at once, the first to end is taken."""
    try:
        with whole(place, replace=False) as half:
            yield half
    except UserError:
        if not place.is_dir():
            raise


def _copy(files: RemoteFiles, name: str, path: Path) -> None:
    """Copy a file: at once if it is small, else some pieces at a time."""
    try:
        if not files.reaches(name, PIECE):
            path.write_bytes(files.read_version(name)[0])
        else:
            _copy_pieces(files, name, path)
        sync_file(path)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{files.url}/{name}: {error}.") from None


def _copy_pieces(files: RemoteFiles, name: str, path: Path) -> None:
    size, (_, version) = files.size(name), files.read_version(name, 0, 1)

    def fetch(start: int) -> int:
        data, found = files.read_version(name, start, min(start + PIECE, size))
        if found != version:
            raise UserError(f"{files.url}/{name} was written again while it was read. Read it again.")
        return os.pwrite(handle, data, start)

    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with ThreadPoolExecutor(files.access.threads) as pool:
            for future in [pool.submit(fetch, start) for start in range(0, size, PIECE)]:
                future.result()
    finally:
        os.close(handle)


def _place(access: Access, url: str, version: bytes) -> Path:
    """Return the folder of one version of an input."""
    digests = [hashlib.sha256(part).hexdigest()[:32] for part in (url.encode(), version)]
    return access.folder() / "inputs" / "-".join(digests)
