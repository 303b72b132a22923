"""A bounded cache on the local disk for bytes of remote stores; processes of one machine may share it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import google_crc32c

TOTAL = ".total"
"""File with the bytes that the cache takes, as text: all processes of the machine add to it, under a lock."""


HALF = ".half-"
"""How the names of files begin that are being written."""

COUNTER_BYTES = 20


class DiskCache:
    """Keeps byte strings in files; when they take too much room, those that were not used for longest are removed.

    The limit holds for all processes of a machine together: they count in one file. Each other file ends in a CRC-32C
    of its contents: a damaged one counts as not there.

    Parameters
    ----------
    folder
        Folder of the files.
    limit
        Bytes that it may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        self._add(0, anew=True)

    def get(self, name: str) -> bytes | None:
        """Return what was put under a name, or None if it is not there any more."""
        path = self.folder / name
        try:
            data = path.read_bytes()
            os.utime(path)  # it was asked for now
        except OSError:
            return None
        if len(data) < 4 or google_crc32c.value(data[:-4]).to_bytes(4, "little") != data[-4:]:
            path.unlink(missing_ok=True)
            return None
        return data[:-4]

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name, if there is room on the disk."""
        half = None
        try:
            handle, place = tempfile.mkstemp(dir=self.folder, prefix=HALF)
            half = Path(place)
            with os.fdopen(handle, "wb") as stream:
                stream.write(data + google_crc32c.value(data).to_bytes(4, "little"))
            half.rename(self.folder / name)
            self._add(len(data) + 4)
        except OSError:  # a full disk: training goes on without the cache
            if half is not None:
                half.unlink(missing_ok=True)

    def _add(self, size: int, *, anew: bool = False) -> None:
        """Count bytes that were put, and make room if there are too many; ``anew``: count what is there."""
        handle = os.open(self.folder / TOTAL, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "r+b") as counter:
            fcntl.flock(counter, fcntl.LOCK_EX)
            said = counter.read().strip()
            total = int(said) + size if said.isdigit() and not anew else sum(size for _, size, _ in self._files())
            if total > self.limit - COUNTER_BYTES:
                total = self._shrink()
            counter.seek(0)
            counter.write(b"%0*d" % (COUNTER_BYTES, total))

    def _shrink(self) -> int:
        """Throw away the oldest files until a tenth of the room is free; return the bytes that are left."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return when each file was last asked for, its size and its path."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name == TOTAL:
                    continue
                try:
                    about = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((about.st_mtime, about.st_size, Path(entry.path)))
        return found
