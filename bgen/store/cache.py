"""A bounded cache on the local disk for bytes of remote stores; processes of one machine may share it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import google_crc32c


class DiskCache:
    """Keeps byte strings in files; when they take too much room, those that were not used for longest are removed.

    Each file ends in a CRC-32C of its contents: a damaged one counts as not there.

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
        self._lock = threading.Lock()
        self._total = sum(size for _, size, _ in self._files())

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
        half = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        try:
            half.write_bytes(data + google_crc32c.value(data).to_bytes(4, "little"))
            half.rename(self.folder / name)
        except OSError:  # a full disk: training goes on without the cache
            half.unlink(missing_ok=True)
            return
        with self._lock:
            self._total += len(data) + 4
            if self._total > self.limit:
                self._shrink()

    def _shrink(self) -> None:
        """Throw away the oldest files until a tenth of the room is free; others may have written or removed some."""
        files = sorted(self._files())
        self._total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._total <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            self._total -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return when each file was last asked for, its size and its path."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    about = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((about.st_mtime, about.st_size, Path(entry.path)))
        return found
