"""Stores that lie elsewhere: ``s3://bucket/store``, ``gs://bucket/store``, ``https://host/store``.

The few small files (manifest, genes, numbers per cell) are copied to a local folder, checked against the manifest, when
the store is opened. Chunks are read one by one, by range, and kept in a bounded cache on the local disk. A request that
fails is made again, after a growing pause; when that does not help, the error names the shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import tensorstore as ts

from bgen.arrays import I64
from bgen.config.data import Access
from bgen.errors import Unreachable, UserError
from bgen.files import write_whole
from bgen.store.cache import DiskCache
from bgen.store.format.manifest import (
    MOST_BYTES,
    NAME,
    Manifest,
    hash_bytes,
    read_checked,
    read_manifest,
    require_written,
)
from bgen.store.format.shards import WHOLE, Stream
from bgen.store.host import locked
from bgen.store.store import Store

SCHEMES = ("s3://", "gs://", "http://", "https://")


def is_remote(where: str | Path) -> bool:
    """Whether a store is named by an address."""
    return str(where).startswith(SCHEMES)


class RemoteFiles:
    """Files below an address.

    Parameters
    ----------
    url
        The address.
    access
        How to read.

    Raises
    ------
    UserError
        If the address has no meaning.
    """

    def __init__(self, url: str, access: Access) -> None:
        self.url, self.access = url.rstrip("/"), access
        retries = {
            "max_retries": access.retries,
            "initial_delay": f"{round(1000 * access.first_pause)}ms",
            "max_delay": f"{round(1000 * access.longest_pause)}ms",
        }
        scheme = self.url.partition(":")[0]
        driver = {"s3": "s3", "gs": "gcs"}.get(scheme, "http")
        resources: dict[str, Any] = {
            f"{driver}_request_retries": retries,
            f"{driver}_request_concurrency": {"limit": access.threads},
        }
        if access.requester_pays and driver != "gcs":  # tensorstore 0.1 says it to S3 by a header that S3 does not know
            raise UserError(f"{url}: a project that pays is for gs:// alone. Copy what is in the bucket first.")
        if access.requester_pays:
            resources["gcs_user_project"] = {"project_id": access.requester_pays}
        context = ts.Context(resources)
        try:
            self._kvstore = ts.KvStore.open(self._spec(driver), context=context).result()
        except ValueError as error:
            raise UserError(f"{url} cannot be opened: {error}") from None

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return a file, or bytes ``start:stop`` of it.

        Raises
        ------
        ValueError
            If it is not there, or too short.
        OSError
            If it cannot be reached.
        """
        return self.read_version(name, start, stop)[0]

    def read_version(self, name: str, start: int | None = None, stop: int | None = None) -> tuple[bytes, bytes]:
        """Return the same, and what tells this version of the file from others, if the server says that.

        Raises
        ------
        ValueError, OSError
            As :meth:`read`.
        """
        try:
            byte_range = None if start is None else slice(start, stop)
            result = self._kvstore.read(name, byte_range=byte_range).result()
        except ValueError as error:
            said = f"{self.url}/{name} cannot be read, after {self.access.retries} retries: {error}"
            raise OSError(said + self._credentials_missing(str(error))) from None
        if result.state != "value":
            raise ValueError(f"{self.url}/{name} is missing")
        if start is not None and stop is not None and len(result.value) != stop - start:
            raise ValueError(f"{self.url}/{name} was cut off: bytes {start} to {stop} are not there")
        return bytes(result.value), bytes(result.stamp.generation)

    def reaches(self, name: str, stop: int) -> bool:
        """Whether a file has so many bytes.

        Raises
        ------
        ValueError, OSError
            As :meth:`read`.
        """
        try:
            self.read(name, stop - 1, stop)
        except OSError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise
            return False
        return True

    def version(self, name: str) -> bytes:
        """Return what tells this version of a file from others; of a server that says nothing of it, the size.

        Raises
        ------
        ValueError, OSError
            As :meth:`read`.
        """
        if not self.reaches(name, 1):
            return b"empty"
        _, found = self.read_version(name, 0, 1)
        return found if len(found) > 1 else b"size %d" % self.size(name)

    def size(self, name: str) -> int:
        """Return the bytes of a file that is not empty, found by asking for single ones.

        Raises
        ------
        ValueError, OSError
            As :meth:`read`.
        """
        low, high = 1, 1 << 20  # a size that it has, and one that it may not have
        while self.reaches(name, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.reaches(name, middle) else (low, middle)
        return low

    def names(self) -> list[str]:
        """Return the names of all files.

        Raises
        ------
        ValueError
            If the server lists none, as those of http(s) do not.
        OSError
            If it cannot be reached.
        """
        if self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url}: what is in it cannot be listed")
        try:
            return sorted(name.decode() for name in self._kvstore.list().result())
        except ValueError as error:
            raise OSError(f"{self.url} cannot be listed: {error}{self._credentials_missing(str(error))}") from None

    def read_at_most(self, name: str, most: int) -> bytes:
        """Return a file, unless it has more than ``most`` bytes.

        Raises
        ------
        ValueError
            If it has, or is not there.
        OSError
            If it cannot be reached.
        """
        try:
            self.read(name, most, most + 1)
        except OSError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise
            return self.read(name)
        raise ValueError(f"{self.url}/{name} has more than {most:,} bytes")

    def exists(self, name: str) -> bool:
        """Whether a file is there.

        Raises
        ------
        UserError
            If that cannot be found out.
        """
        try:
            self.read(name, 0, 1)
        except ValueError:
            return False
        except OSError as error:
            if "PERMISSION_DENIED" in str(error):  # S3's answer for a missing file to those who may not list the bucket
                return False
            raise Unreachable(str(error)) from None
        return True

    def _credentials_missing(self, said: str) -> str:
        """Say what to do where S3 answers that one may not read, which is all that it says to those without a key."""
        words = ("PERMISSION_DENIED", "UNAUTHENTICATED", "credentials")
        if not self.url.startswith("s3://") or self.access.anonymous or not any(word in said for word in words):
            return ""
        return (
            " Are credentials there (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)? A public bucket needs"
            " none: --anonymous, or data.access.anonymous=true."
        )

    def _spec(self, driver: str) -> dict[str, Any]:
        place = self.url.split("://", 1)[1]
        if driver == "http":
            scheme = self.url.partition(":")[0]
            host, _, path = place.partition("/")
            return {"driver": "http", "base_url": f"{scheme}://{host}", "path": f"/{path}/"}
        bucket, _, path = place.partition("/")
        spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{path}/" if path else ""}
        if driver == "s3":
            endpoint = (
                self.access.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            )
            region = self.access.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            if endpoint:
                spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
            elif region:
                spec["aws_region"] = region
            if self.access.anonymous:
                spec["aws_credentials"] = {"type": "anonymous"}
        return spec


class Mirror:
    """The local copy of a store's small files, and the cache of its chunks.

    Parameters
    ----------
    files
        Where the store lies.

    Raises
    ------
    UserError
        If there is no store, or it cannot be read.
    """

    def __init__(self, files: RemoteFiles) -> None:
        self.files = files
        try:
            text = files.read_at_most(NAME, MOST_BYTES)
        except ValueError as error:
            raise UserError(f"There is no store at {files.url}: {error}.") from None
        except OSError as error:
            raise Unreachable(str(error)) from None
        # one folder for each manifest: a store that was built again is not mixed up with the one before
        place = files.access.folder() / hashlib.sha256(text).hexdigest()[:32]
        self.folder = place / "files"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / NAME, text)
        self.manifest = read_manifest(self.folder)
        self.cache = DiskCache(place / "chunks", files.access.cache_bytes)

    def load(self, name: str) -> bytes:
        """Return the bytes of a file of the manifest: those of the local copy, if they are what was written.

        Raises
        ------
        ValueError
            If it is missing, or not what was written.
        OSError
            If it cannot be reached.
        """
        file = self.manifest.files[name]
        try:
            return read_checked(self.folder, name, file)
        except (ValueError, OSError):  # not there yet, or damaged
            data = require_written(self.files.read(name, 0, file.bytes) if file.bytes else b"", name, file)
        write_whole(self.folder / name, data)
        return data

    def fetch(self, names: Iterable[str]) -> None:
        """Copy those files of the manifest that are not here, as many at a time as requests may be under way.

        The first process of a machine that needs them does it, and the others wait for it.

        Raises
        ------
        ValueError, OSError
            As :meth:`load`.
        """

        def copy(name: str) -> None:
            self.load(name)

        if not (missing := self._missing(names)):
            return
        with locked(self.folder.parent), ThreadPoolExecutor(self.files.access.threads) as pool:
            for _ in pool.map(copy, self._missing(missing)):
                pass

    def _missing(self, names: Iterable[str]) -> list[str]:
        """Return the names of files that are not here, or have another size."""
        found = []
        for name in names:
            try:
                if (self.folder / name).stat().st_size == self.manifest.files[name].bytes:
                    continue
            except OSError:
                pass
            found.append(name)
        return found

    def find_damaged_files(self, manifest: Manifest) -> list[str]:
        """Read every byte at the address and describe the files that are not as the manifest says."""
        problems = []
        for name, file in manifest.files.items():
            try:
                if hash_bytes(self.files.read_at_most(name, file.bytes)) != file:
                    problems.append(f"{name} does not have the bytes that were written (its checksum differs)")
            except (ValueError, OSError) as error:
                problems.append(str(error))
        return problems

    def read(self, name: str, start: int, stop: int, checksum: int | None = None) -> bytes:
        """Return bytes ``start:stop`` of a file, from the cache if they are there.

        They are kept if their CRC-32C is ``checksum``; by default, if their own CRC-32C stands at their end.
        """
        key = f"{name.replace('/', '-')}-{start}"
        data = self.cache.get(key)
        if data is None or len(data) != stop - start:
            data = self.files.read(name, start, stop)
            if google_crc32c.value(data) == (WHOLE if checksum is None else checksum):
                self.cache.put(key, data)
        return data


class RemoteStream(Stream):
    """Reads chunks of one stream from afar."""

    def __init__(self, mirror: Mirror, name: str) -> None:
        super().__init__(mirror.folder / name, mirror.manifest.profile)
        self._mirror, self._stream = mirror, name

    def announce(self, chunks: I64) -> None:
        """See :class:`Stream`; nothing can be said to a server in advance."""

    def _index(self, number: int) -> I64:
        # not under the lock: other threads need not wait for this shard's index to read the next one's
        if number not in self._indices:
            size, length = self._size(number), 16 * self._slots + 4
            data = self._read_range(number, size - length, length)
            index = self._parse_index(number, data, size)
            if int(index.sum(1).max()) + length != size:
                raise ValueError(f"{self._name(number)} is not the file that the manifest describes")
            self._indices[number] = index
        return self._indices[number]

    def _size(self, number: int) -> int:
        return self._mirror.manifest.files[self._path(number)].bytes

    def _read_range(self, number: int, offset: int, size: int) -> bytes:
        return self._mirror.read(self._path(number), offset, offset + size)

    def _path(self, number: int) -> str:
        return f"{self._stream}/c/{number}/0"

    def _name(self, number: int) -> str:
        return f"{self._mirror.files.url}/{self._path(number)}"


class RemoteStore(Store):
    """A store at an address (see :class:`bgen.store.store.Store`).

    Raises
    ------
    UserError
        If it cannot be read, or its small files are not what was written.
    """

    def __init__(self, url: str, access: Access | None = None) -> None:
        access = access or Access()
        self._mirror = Mirror(RemoteFiles(url, access))
        self.url = self._mirror.files.url
        self._threads = access.threads
        super().__init__(self._mirror.folder, threads=access.threads, access=access)

    @property
    def chunks_per_task(self) -> int:
        """See :class:`bgen.store.store.Store`; each request waits for the server, so none waits for another."""
        return 1

    def windows_ahead(self, window: int) -> int:
        """See :class:`bgen.store.store.Store`: as many that requests follow one another while windows are awaited.

        A task makes two requests, one after the other, so that this is three times what the threads read at once.
        """
        return max(super().windows_ahead(window), -(-3 * self._threads // (2 * window)))

    def find_damaged_files(self) -> list[str]:
        """See :class:`bgen.store.store.Store`."""
        return self._mirror.find_damaged_files(self.manifest)

    def _find_damage(self) -> list[str]:
        return []  # nothing is known of files before they are read

    @property
    def _where(self) -> str:
        return self.url

    def _stream(self, name: str) -> Stream:
        return RemoteStream(self._mirror, name)

    def _read_file(self, name: str) -> bytes:
        return self._mirror.load(name)

    def _copy_here(self, names: Iterable[str]) -> None:
        self._mirror.fetch(names)
