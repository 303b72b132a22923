"""A store in WebDataset form (data_tools/export/to_webdataset.py), on a disk or at an address, read block by block.

It has the fingerprint of the store that it was made from, so the same cells come at the same step, and a run can go on
from one form with the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bgen.arrays import I64
from bgen.errors import Unreachable, UserError
from bgen.files import write_whole
from bgen.store.format.manifest import MOST_BYTES, File, check_files, hash_file, require_inside
from bgen.store.format.shards import Stream
from bgen.store.remote import Access, Mirror, RemoteFiles, is_remote
from bgen.store.store import Store

INDEX = "webdataset.json"
BLOCKS = "blocks.npy"
VERSION = 1
STREAMS = ("gaps", "counts")
HELD = tuple(f"{name}/" for name in STREAMS)
"""How files of a store begin that the shards hold."""


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
        self.profile = "small"

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
        How an address is read, and the cache folder.
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
        self._index = self._read_index(folder)
        super().__init__(folder, threads=threads, access=access)
        if self._index["store"] != self.fingerprint:
            raise UserError(f"{self.where}: {INDEX} and manifest.json are of different stores. Write them again.")

    @property
    def _where(self) -> str:
        return self.where

    def _read_index(self, folder: Path) -> dict[str, Any]:
        """Return webdataset.json, and have blocks.npy in the folder."""
        try:
            if self._mirror is not None:
                text = self._mirror.files.read_at_most(INDEX, MOST_BYTES)
            elif (folder / INDEX).stat().st_size <= MOST_BYTES:
                text = (folder / INDEX).read_bytes()
            else:
                raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
            index = json.loads(text)
            fingerprint = index.pop("fingerprint")
            for name in index["shards"]:
                require_inside(name)
            if hashlib.sha256(json.dumps(index, indent=1).encode()).hexdigest() != fingerprint:
                raise ValueError("it was changed after it was written")
            if self._mirror is not None:
                size = File.model_validate(index["blocks"]).bytes
                write_whole(folder / BLOCKS, self._mirror.files.read_at_most(BLOCKS, size))
            if not (folder / BLOCKS).is_file() or hash_file(folder / BLOCKS) != File.model_validate(index["blocks"]):
                raise ValueError(f"{BLOCKS} does not have the bytes that were written")
            index["shards"] = {name: File.model_validate(file) for name, file in index["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.where} cannot be read as WebDataset: {INDEX}: {error}") from None
        except OSError as error:
            raise Unreachable(f"{self.where} cannot be reached: {error}") from None
        return index

    def _find_damage(self) -> list[str]:
        if self._mirror is not None:
            return []
        manifest = self.manifest.model_copy(update={"files": self._index["shards"]})
        return check_files(self.folder, manifest, checksums=False)

    def find_damaged_files(self) -> list[str]:
        """See :class:`bgen.store.store.Store`."""
        files = {name: file for name, file in self.manifest.files.items() if not name.startswith(HELD)}
        manifest = self.manifest.model_copy(update={"files": files | self._index["shards"]})
        if self._mirror is not None:
            return self._mirror.find_damaged_files(manifest)
        return check_files(self.folder, manifest, checksums=True)

    def _open_streams(self) -> list[Stream]:
        blocks, shards = self._read_blocks(), list(self._index["shards"])
        return [TarStream(self.folder, self._mirror, shards, blocks[:, [0, at, at + 1, at + 2]]) for at in (1, 4)]

    def _read_blocks(self) -> I64:
        """Return blocks.npy, int64 ``[n_chunks, 7]``, once it is known that it stays within the shards.

        Raises
        ------
        UserError
            If it does not.
        """
        sizes = np.array([file.bytes for file in self._index["shards"].values()], np.int64)
        try:
            blocks = np.load(self.folder / BLOCKS, mmap_mode="r")  # its header may promise any size
            if blocks.shape != (self.manifest.n_chunks, 7) or blocks.dtype != np.int64:
                raise ValueError("it does not describe the chunks of the manifest")
            if not 0 <= blocks[:, 0].min() <= blocks[:, 0].max() < len(sizes):
                raise ValueError("it names shards that are not there")
            for at, room in ((1, self.manifest.gap_bytes), (4, self.manifest.count_bytes)):
                begin, size = blocks[:, at], blocks[:, at + 1]
                most = np.minimum(sizes[blocks[:, 0]], room + room // 64 + 4096)
                if (begin < 0).any() or (size < 0).any() or (size > most).any():
                    raise ValueError("it leads out of the shards")
                if (begin > sizes[blocks[:, 0]] - size).any():
                    raise ValueError("it leads out of the shards")
            if not 0 <= blocks[:, [3, 6]].min() <= blocks[:, [3, 6]].max() < 1 << 32:
                raise ValueError("it holds no checksums")
        except (ValueError, OSError, EOFError) as error:
            raise self.damaged(ValueError(f"{BLOCKS}: {error}")) from None
        return np.array(blocks)

    def _read_file(self, name: str) -> bytes:
        return super()._read_file(name) if self._mirror is None else self._mirror.load(name)

    def _copy_here(self, names: Iterable[str]) -> None:
        if self._mirror is not None:
            self._mirror.fetch(name for name in names if not name.startswith(HELD))
