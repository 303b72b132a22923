from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import tensorstore as ts

from bgen.data.loader import CountReader
from bgen.errors import UserError
from bgen.store.format.shards import Stream, compress, read_ahead, shard_path, write_shard
from bgen.store.store import SHARD_CHUNKS, Store, array_spec, stream_metadata

ROOM = 5000


@pytest.fixture(params=["small", "fast"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, np.ndarray]:
    """An array of two shards, the second of which is not full, written by us."""
    rng = np.random.default_rng(0)
    rows = rng.geometric(0.1, (SHARD_CHUNKS + 3, ROOM)).clip(max=255).astype(np.uint8)
    folder = tmp_path / "gaps"
    ts.open(array_spec(folder, stream_metadata(len(rows), ROOM, request.param))).result()
    for number in range(2):
        part = rows[number * SHARD_CHUNKS :][:SHARD_CHUNKS]
        write_shard(shard_path(folder, number), (compress(row, request.param) for row in part), SHARD_CHUNKS)
    return folder, request.param, rows


def test_other_zarr_readers_read_our_shards(stream: tuple[Path, str, np.ndarray]) -> None:
    folder, _, rows = stream
    assert np.array_equal(ts.open(array_spec(folder), open=True, read=True).result().read().result(), rows)


def test_we_read_shards_of_other_writers(stream: tuple[Path, str, np.ndarray]) -> None:
    folder, profile, rows = stream
    other = folder.with_name("counts")
    ts.open(array_spec(other, stream_metadata(len(rows), ROOM, profile))).result().write(rows).result()
    chunks = np.array([258, 3, 255, 256, 0])
    for path in (folder, other):
        out = np.zeros((9, ROOM), np.uint8)
        slots = np.array([8, 1, 0, 4, 5])
        with ThreadPoolExecutor(2) as pool:
            for future in read_ahead(pool, [(Stream(path, profile), out)], chunks, slots):
                future.result()
        assert np.array_equal(out[slots], rows[chunks])
        assert not out[[2, 3, 6, 7]].any()


def test_our_zstd_is_smaller_than_level_1() -> None:
    rng = np.random.default_rng(0)
    row = rng.geometric(0.58, 400_000).astype(np.uint8)  # like counts
    level_1 = numcodecs.Zstd(1).encode(row)
    assert len(compress(row, "small")) < 0.99 * len(level_1)


def test_damage_is_named(stream: tuple[Path, str, np.ndarray]) -> None:
    folder, profile, rows = stream
    out = np.zeros(ROOM, np.uint8)
    path = shard_path(folder, 1)
    data = bytearray(path.read_bytes())
    for at, message in (
        (50, r"chunk 256 in .*gaps/c/1/0 does not"),
        (len(data) - 9, r"index of .*gaps/c/1/0 does not"),
    ):
        damaged = data.copy()
        damaged[at] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            Stream(folder, profile).read(256, out)
    path.write_bytes(data[:100])
    with pytest.raises(ValueError, match="index of"):
        Stream(folder, profile).read(256, out)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="chunk 300"):  # a chunk that was never written
        Stream(folder, profile).read(300, out)
    Stream(folder, profile).read(255, out)
    assert np.array_equal(out, rows[255])
    path.unlink()
    with pytest.raises(OSError, match="gaps/c/1/0"):
        Stream(folder, profile).read(257, out)


def test_a_shard_that_vanishes_after_opening_is_named(store: Store, tmp_path: Path) -> None:
    copy = Store(shutil.copytree(store.folder, tmp_path / "copy"))
    shard_path(copy.folder / "counts", 0).unlink()
    with pytest.raises(UserError, match="counts/c/0/0"):
        CountReader(copy).read_cells(np.arange(5))
