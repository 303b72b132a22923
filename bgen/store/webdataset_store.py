"""A store in WebDataset form (data_tools/export/to_webdataset.py), on a disk or at an address, read block by block.

It has the fingerprint of the store that it was made from, so the same cells come at the same step, and a run can go on
from one form with the other.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.store.format.manifest import File, check_files, hash_file
from bgen.store.format.shards import CODECS, Stream
from bgen.store.remote import Access, Mirror, RemoteFiles, is_remote, write_whole
from bgen.store.store import Store

INDEX = "webdataset.json"
BLOCKS = "blocks.npy"
VERSION = 1
STREAMS = ("gaps", "counts")


class TarStream(Stream):
    """Reads chunks of one stream from tar shards.

    Parameters
    ----------
    folder
        Folder of the shards, or of the local copies of the other files.
    mirror
        Reads the shards if they lie elsewhere.
    shards
        Their paths, by number.
    blocks
        int64 ``[n_chunks, 4]``: shard, offset, bytes and CRC-32C of each chunk.
    """

    def __init__(self, folder: Path, mirror: Mirror | None, shards: list[str], blocks: I64) -> None:
        self.folder, self._mirror, self._shards, self._blocks = folder, mirror, shards, blocks
        self._codec = CODECS["small"]

    def announce(self, chunks: I64) -> None:
        """See :class:`Stream`."""

    def fetch(self, chunk: int) -> bytes:
        """See :class:`Stream`."""
        shard, offset, size, checksum = self._blocks[chunk].tolist()
        if self._mirror is not None:
            data = self._mirror.read(self._shards[shard], offset, offset + size, checksum)
        else:
            with (self.folder / self._shards[shard]).open("rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        return data + int(checksum).to_bytes(4, "little")

    def name_of(self, chunk: int) -> str:
        """See :class:`Stream`."""
        where = str(self.folder) if self._mirror is None else self._mirror.files.url
        return f"{where}/{self._shards[int(self._blocks[chunk, 0])]}"


class TarStore(Store):
    """A store in WebDataset form (see :class:`bgen.store.store.Store`).

    Parameters
    ----------
    where
        Folder or address.
    access
        How an address is read.
    threads
        Threads that decode, for a folder.

    Raises
    ------
    UserError
        If it cannot be read, or is not what was written.
    """

    def __init__(self, where: str | Path, access: Access | None = None, *, threads: int = 2) -> None:
        self._mirror: Mirror | None = None
        self.where, folder = str(where), Path(where)
        if is_remote(where):
            access = access or Access()
            threads = access.threads
            self._mirror = Mirror(RemoteFiles(str(where), access))
            folder = self._mirror.folder
            for below in ("genes.csv", "rows/"):
                self._mirror.copy(below)
        self._index = self._read_index(folder)
        super().__init__(folder, threads=threads)
        if self._index["store"] != self.fingerprint:
            raise UserError(f"{self.where}: {INDEX} and manifest.json are of different stores. Write them again.")

    def damaged(self, error: Exception) -> UserError:
        """See :class:`bgen.store.store.Store`."""
        return UserError(f"The store {self.where} cannot be read: {error}")

    def _read_index(self, folder: Path) -> dict[str, Any]:
        """Return webdataset.json, and have blocks.npy in the folder."""
        try:
            text = (folder / INDEX).read_bytes() if self._mirror is None else self._mirror.files.read(INDEX)
            index = json.loads(text)
            fingerprint = index.pop("fingerprint")
            if hashlib.sha256(json.dumps(index, indent=1).encode()).hexdigest() != fingerprint:
                raise ValueError("it was changed after it was written")
            if self._mirror is not None:
                write_whole(folder / BLOCKS, self._mirror.files.read(BLOCKS))
            if not (folder / BLOCKS).is_file() or hash_file(folder / BLOCKS) != File.model_validate(index["blocks"]):
                raise ValueError(f"{BLOCKS} does not have the bytes that were written")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.where} cannot be read as WebDataset: {INDEX}: {error}") from None
        return index

    def _find_damage(self) -> list[str]:
        problems = [
            problem
            for below in ("genes.csv", "rows/")
            for problem in check_files(self.folder, self.manifest, checksums=True, below=below)
        ]
        if self._mirror is None:
            shards = {name: File.model_validate(file) for name, file in self._index["shards"].items()}
            manifest = self.manifest.model_copy(update={"files": shards})
            problems += check_files(self.folder, manifest, checksums=False)
        return problems

    def find_damaged_files(self) -> list[str]:
        """Read every byte on this machine and describe the files that are not as they were written."""
        streams = ("gaps/", "counts/")  # which the shards hold
        files = {name: file for name, file in self.manifest.files.items() if not name.startswith(streams)}
        files |= {name: File.model_validate(file) for name, file in self._index["shards"].items()}
        return check_files(self.folder, self.manifest.model_copy(update={"files": files}), checksums=True)

    def _open_streams(self) -> list[Stream]:
        blocks = np.load(self.folder / BLOCKS)
        shards = list(self._index["shards"])
        return [TarStream(self.folder, self._mirror, shards, blocks[:, [0, at, at + 1, at + 2]]) for at in (1, 4)]

    def _read_array(self, name: str) -> NDArray[Any]:
        if self._mirror is not None:
            self._mirror.copy(f"{name}/")
        return super()._read_array(name)
