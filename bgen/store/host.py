"""Numbers per cell, one copy for all processes of a machine: files in the cache folder that every process maps.

The first process that needs an array makes its file, under a lock, and the others wait for it. A file ends in a CRC-32C
of its contents, which is compared whenever a process opens it: one that is damaged, or was not finished, is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import DTypeLike, NDArray

from bgen.store.format.shards import WHOLE

HALF = ".half-"
"""How the names of files begin that are being written."""

LOCK = ".lock"

UNUSED_DAYS = 30
"""Days after which a file that no process has opened since may be removed."""

PIECE = 1 << 20
"""Bytes that are read at a time to compare a checksum."""

Fill = Callable[[NDArray[Any]], None]
"""Writes the values into an empty array."""


class HostArrays:
    """Arrays in one dimension that the processes of a machine share.

    A process has them mapped, which takes no memory of its own: the pages are the system's file cache, and all
    processes see the same ones. Files that nobody has opened for :data:`UNUSED_DAYS` days are removed when another is
    made; whoever has one mapped keeps it.

    Parameters
    ----------
    folder
        Folder of the files, best on a local disk; it need not be there. None: this user has none.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._warned = False

    def get(self, key: str, n: int, dtype: DTypeLike, fill: Fill) -> NDArray[Any]:
        """Return the array ``[n]`` of a key, not to be written to; ``fill`` writes it if it is not there yet.

        Where there is no room for the file, a process has the array in its own memory, and a warning says so.
        """
        of = np.dtype(dtype)
        if self.folder is None:
            return self._own(n, of, fill, "this user has no home folder")
        path = self.folder / hashlib.sha256(f"{key}/{n}/{of.str}".encode()).hexdigest()[:32]
        if (found := _open(path, n, of)) is not None:
            return found
        failed: list[BaseException] = []

        def fill_or_note(values: NDArray[Any]) -> None:
            try:
                fill(values)
            except BaseException as error:  # no trouble of the cache: not to be tried again
                failed.append(error)
                raise

        try:
            with locked(self.folder):
                if (found := _open(path, n, of)) is None:
                    self._make(path, n, of, fill_or_note)
                    found = _open(path, n, of)
        except OSError as error:
            if failed:
                raise
            return self._own(n, of, fill, f"{self.folder}: {error}")
        return (
            self._own(n, of, fill, f"{self.folder}: what is written there is not read back") if found is None else found
        )

    def _own(self, n: int, dtype: np.dtype[Any], fill: Fill, why: str) -> NDArray[Any]:
        """Return an array in this process' own memory, and warn, once."""
        if not self._warned:
            print(
                f"warning: numbers per cell cannot be shared ({why}): each process of this machine holds its own copy."
                " Name a folder with room in data.access.cache, or in XDG_CACHE_HOME.",
                file=sys.stderr,
                flush=True,
            )
            self._warned = True
        values = np.empty(n, dtype)
        fill(values)
        values.flags.writeable = False
        return values

    def _make(self, path: Path, n: int, dtype: np.dtype[Any], fill: Fill) -> None:
        self._remove_unused(path.parent)
        size = n * dtype.itemsize
        handle, place = tempfile.mkstemp(dir=path.parent, prefix=HALF)
        half = Path(place)
        try:
            with os.fdopen(handle, "r+b") as file:
                if sys.platform == "darwin":  # which has no such call
                    file.truncate(size + 4)
                else:
                    os.posix_fallocate(file.fileno(), 0, size + 4)  # a full disk says so now, and not by a signal
                values = np.memmap(file, dtype, "r+", shape=(n,))
                fill(values)
                values.flush()
                del values
                file.seek(size)
                file.write(_checksum(file.fileno(), size).to_bytes(4, "little"))
            half.rename(path)
        finally:
            half.unlink(missing_ok=True)

    @staticmethod
    def _remove_unused(folder: Path) -> None:
        before = time.time() - 86_400 * UNUSED_DAYS
        with os.scandir(folder) as entries:
            for entry in entries:
                # who holds the lock knows that nobody else is writing: what is half is of a process that was killed
                unused = entry.name != LOCK and entry.stat(follow_symlinks=False).st_mtime < before
                if unused or entry.name.startswith(HALF):
                    Path(entry.path).unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process (or thread) of this machine is in here for a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone does not: a process forked meanwhile holds it, too
        os.close(handle)


def _open(path: Path, n: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Map a file, or return None if it is not there, or not whole, or another user's."""
    size = n * dtype.itemsize
    try:
        with path.open("rb", buffering=0) as file:
            about = os.fstat(file.fileno())
            if about.st_size != size + 4 or about.st_uid != os.geteuid():
                return None
            if _checksum(file.fileno(), size + 4) != WHOLE:
                return None
            os.utime(path)  # it is in use
            return np.asarray(np.memmap(file, dtype, "r", shape=(n,)))
    except OSError:
        return None


def _checksum(handle: int, size: int) -> int:
    """Return the CRC-32C of the first bytes of a file, read without mapping them."""
    crc = 0
    for start in range(0, size, PIECE):
        crc = google_crc32c.extend(crc, os.pread(handle, min(PIECE, size - start), start))
    return crc
