"""A store at a server that answers late: the server's answers, how many requests wait at once, and the table."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bgen.bench.loaders.atlas import Atlas
from bgen.bench.loaders.loaders import prepare
from bgen.bench.loaders.remote import bench_remote, measure, most_waiting, serve_late, table
from bgen.errors import UserError


@pytest.fixture(scope="module")
def store(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("cache"), atlas, {}, {}, lambda said: None) / "small"


def ask(url: str, asked: str = "") -> bytes:
    request = urllib.request.Request(url, headers={"Range": asked} if asked else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def test_as_many_requests_wait_as_are_allowed(store: Path, tmp_path: Path) -> None:
    with serve_late(store.parent) as url:
        found = measure(f"{url}/100/small", 6, 0.1, tmp_path / "cache")
        assert most_waiting(url) == 6
        assert most_waiting(url) == 0
        manifest = (store / "manifest.json").read_bytes()
        assert ask(f"{url}/0/small/manifest.json") == manifest
        assert ask(f"{url}/0/small/manifest.json", "bytes=5-8") == manifest[5:9]
        for path, asked in (("small/none", ""), ("../etc", ""), ("small/manifest.json", "bytes=99999999-")):
            with pytest.raises(urllib.error.HTTPError, match=r"404|416"):
                ask(f"{url}/0/{path}", asked)
    assert found["wall_rate"] > 0
    assert found["open_s"] > 0.1
    local = measure(str(store), 6, 0.1, tmp_path / "cache")
    assert local["wall_rate"] > 0


@pytest.mark.slow  # starts processes that each import torch
def test_latencies_are_measured_beside_the_disk(store: Path, tmp_path: Path) -> None:
    said: list[str] = []
    rows = bench_remote(tmp_path / "out", store, [20], requests=4, seconds=0.1, repetitions=1, say=said.append)
    assert [row["latency_ms"] for row in rows] == [None, 20]
    assert rows[0]["over_local"] == 1
    assert (rows[0]["most"], rows[1]["most"]) == (0, 4)
    assert json.loads((tmp_path / "out" / "remote.json").read_text())["rows"] == rows
    assert table(rows) in said
    with pytest.raises(UserError, match=r"Reading .*nothing failed"):
        bench_remote(tmp_path / "out", store.parent / "nothing", [20], requests=4, seconds=0.1, repetitions=1)
