"""A model behind HTTP: `bgen serve` in a process of its own, asked rightly, wrongly, by many and by the slow."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import psutil
import pytest
import scipy.sparse as sp
from prefork import python

from bgen.tasks.load import load_model

sys.path.append(str(Path(__file__).parent))
from bgen_server import H5AD, Server, running

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason="not installed: fastapi, uvicorn (extra serve)",
)


@pytest.fixture(scope="module")
def server(demo: Any) -> Iterator[Server]:
    with running(demo.model, "--cells", 300, "--body", 4, "--seconds", 5) as made:
        yield made


@pytest.fixture(scope="module")
def cells(demo: Any) -> anndata.AnnData:
    return anndata.read_h5ad(demo.cells)[:20].copy()


def in_json(cells: anndata.AnnData) -> dict[str, Any]:
    counts = sp.csr_matrix(cells.X)
    sparse = {name: getattr(counts, name).tolist() for name in ("indptr", "indices", "data")}
    return {"genes": cells.var_names.tolist(), "counts": sparse, "obs": {"batch": cells.obs["batch"].tolist()}}


def test_it_says_what_it_is(server: Server, demo: Any) -> None:
    assert server.ask("/health") == (200, {"status": "ok"})
    code, told = server.ask("/model")
    model = load_model(demo.model)
    assert (code, told["fingerprint"]) == (200, model.saved.fingerprint())
    assert told["conditions"]["cell_type"] == model.conditions["cell_type"]
    code, api = server.ask("/openapi.json")
    assert {"/generate", "/embed", "/annotate", "/perturb", "/model", "/health", "/metrics"} == set(api["paths"])
    asked = api["paths"]["/embed"]["post"]["requestBody"]["content"]
    assert {"application/json", H5AD} == set(asked)
    assert "cells" in asked["application/json"]["schema"]["properties"]


def test_cells_are_those_of_the_model(server: Server, demo: Any) -> None:
    asked = {"n": 6, "seed": 3, "where": {"cell_type": "B"}}
    straight = load_model(demo.model).generate(6, seed=3, where={"cell_type": "B"})
    code, told = server.ask("/generate", asked)
    assert code == 200
    counts = told["counts"]
    made = sp.csr_matrix((counts["data"], counts["indices"], counts["indptr"]), shape=straight.shape)
    assert (made != straight.X).nnz == 0
    assert told["genes"] == straight.var_names.tolist()
    assert told["obs"]["cell_type"] == ["B"] * 6
    code, file = server.ask("/generate", asked, Accept=H5AD)
    assert code == 200
    assert (anndata.read_h5ad(io.BytesIO(file)).X != straight.X).nnz == 0


def test_cells_come_as_json_and_as_a_file(server: Server, demo: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    straight = load_model(demo.model).embed(cells).obsm["X_bgen"]
    code, told = server.ask("/embed", {"cells": in_json(cells)})
    assert code == 200, told
    np.testing.assert_allclose(told["X_bgen"], straight, atol=1e-5)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    body = (tmp_path / "cells.h5ad").read_bytes()
    code, told = server.ask("/embed?floor=0.5", body, Content_Type=H5AD)
    assert code == 200, told
    np.testing.assert_allclose(told["X_bgen"], straight, atol=1e-5)
    code, told = server.ask("/annotate?label=cell_type", body, Content_Type=H5AD)
    assert (code, len(told["obs"]["cell_type_bgen"])) == (200, 20), told


def test_what_is_wrong_is_a_4xx_with_a_sentence(server: Server, cells: anndata.AnnData) -> None:
    good = in_json(cells)
    short = {**good, "obs": {"batch": ["b"]}}
    broken = {**good, "counts": {"indptr": [0, 5], "indices": [0], "data": [1.0]}}
    for path, content, headers, code, told in (
        ("/nowhere", {}, {}, 404, "There are /, /annotate"),
        ("/health", {}, {}, 405, "Method Not Allowed"),
        ("/generate", b"{", {}, 400, "no JSON"),
        ("/generate", b"[" * 5000, {}, 400, "no JSON"),
        ("/generate", [1], {}, 422, "a JSON object"),
        ("/generate", {"n": 0}, {}, 422, "n: Input should be greater"),
        ("/generate", {"m": 1}, {}, 422, "m: Extra inputs"),
        ("/generate", {"n": 301}, {}, 413, "at most 300 at once"),
        ("/generate", {"where": {"cell_typ": "B"}}, {}, 422, "Did you mean 'cell_type'"),
        ("/generate", {"where": {"cell_type": "X"}}, {}, 422, "X"),
        ("/generate", b"x" * (5 << 20), {}, 413, "at most 4,194,304 bytes"),
        ("/embed", {}, {}, 422, "the request"),
        ("/embed", {"cells": short}, {}, 422, "has 1 values for 20 cells"),
        ("/embed", {"cells": broken}, {}, 422, "counts"),
        ("/embed", {"cells": {**good, "counts": [[1.0]]}}, {}, 422, "one for each gene"),
        ("/embed", {"cells": {"genes": ["nothing"], "counts": [[1.0]]}}, {}, 422, "genes"),
        ("/embed", b"\x89HDF\r\n\x1a\nrubbish", {"Content_Type": H5AD}, 422, ""),
        ("/embed?flor=1", b"", {"Content_Type": H5AD}, 422, "flor"),
        ("/perturb", {"cells": good, "perturbation": "x", "control": "y"}, {}, 422, "control_column"),
    ):
        found, answer = server.ask(path, content, **headers)
        assert found == code, (path, answer)
        assert told in answer["error"], (path, answer)
        assert "/tmp" not in answer["error"] or path.startswith("/embed"), answer


def test_many_at_once_and_bad_ones_among_them(server: Server, cells: anndata.AnnData) -> None:
    """Every answer is a 2xx or a clear 4xx, whoever asks; and afterwards nothing waits and nothing is left."""
    memory = psutil.Process(server.process.pid)
    good = json.dumps({"cells": in_json(cells[:2])}).encode()
    port = int(server.address.rpartition(":")[2])

    def ask(number: int) -> int:
        if number % 4 == 3:  # goes away in the middle
            with socket.create_connection(("127.0.0.1", port), 60) as cut:
                cut.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{" + good[: 50 * number])
            return 0
        contents = [good, b"{}", good[: -(number + 1)]]
        return server.ask("/embed", contents[number % 4])[0]

    server.ask("/embed", good)
    with ThreadPoolExecutor(20) as pool:
        codes = list(pool.map(ask, range(60)))
    assert codes.count(200) == 15
    assert set(codes) == {0, 200, 422, 400}
    before = memory.memory_info().rss
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(60)))
    assert server.ask("/health")[0] == 200
    assert memory.memory_info().rss < 1.1 * before + (20 << 20)
    _, told = server.ask("/metrics")
    assert b"bgen_requests_waiting 0" in told
    assert int(re.search(rb'path="/embed",code="200"} (\d+)', told)[1]) >= 30  # type: ignore[index]


def test_a_seed_gives_the_same_cells_however_many_ask(server: Server) -> None:
    asked = [{"n": 1 + number % 3, "seed": number} for number in range(24)]
    alone = [server.ask("/generate", each) for each in asked]
    with ThreadPoolExecutor(24) as pool:
        at_once = list(pool.map(lambda each: server.ask("/generate", each), asked))
    assert [code for code, _ in alone] == [200] * 24
    assert at_once == alone


@pytest.mark.slow
def test_two_hundred_at_once_and_a_thousand_bad_ones(demo: Any, cells: anndata.AnnData) -> None:
    """Prints the time of an answer (median, 95 % are below) beside that of the bare function; no crash, no leak."""
    model = load_model(demo.model)
    few = cells[:2].copy()
    times = [time.perf_counter()]
    for _ in range(21):
        model.embed(few)
        times.append(time.perf_counter())
    bare = float(np.median(np.diff(times)))
    good = json.dumps({"cells": in_json(few)}).encode()
    with running(demo.model, "--body", 1, "--seconds", 3) as server:
        memory = psutil.Process(server.process.pid)
        port = int(server.address.rpartition(":")[2])

        def right(_: int) -> tuple[int, float]:
            begin = time.perf_counter()
            code, _ = server.ask("/embed", good)
            return code, time.perf_counter() - begin

        def wrong(number: int) -> int:
            kind = number % 5
            if kind < 3:
                content = (good[: number % len(good)], b"x" * (2 << 20), b'{"cells": 1}')[kind]
                return server.ask("/embed", content)[0]
            with socket.create_connection(("127.0.0.1", port), 300) as sent:
                sent.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n{")
                return 0 if kind == 3 else int(sent.recv(100).split()[1])  # aborted, or slow

        right(0)
        with ThreadPoolExecutor(50) as pool:
            list(pool.map(wrong, range(200)))
            before = memory.memory_info().rss
            found = set(pool.map(wrong, range(1000)))
        after = memory.memory_info().rss
        with ThreadPoolExecutor(200) as pool:
            codes, seconds = zip(*pool.map(right, range(200)), strict=True)
        alone = [right(0)[1] for _ in range(20)]
    assert found == {0, 400, 408, 413, 422}
    assert set(codes) == {200}
    assert after < 1.1 * before
    median, most = np.percentile(seconds, [50, 95])
    print(f"bare {1e3 * bare:.1f} ms; one after the other {1e3 * np.median(alone):.1f} ms; 200 at once: median")
    print(f"{1e3 * median:.0f} ms, 95 % below {1e3 * most:.0f} ms; memory {before >> 20} to {after >> 20} MB")


def test_a_token_is_asked_for_and_no_more_wait_than_may_and_who_is_slow_is_told_so(
    server: Server, demo: Any, bgen: Any
) -> None:
    slow = begin(server, 1000)  # and no more: while it is waited for, another server is asked
    with running(demo.model, "--waiting", 1, python=python(), BGEN_TOKEN="secret") as guarded:
        assert guarded.ask("/health")[0] == 200
        code, told = guarded.ask("/model")
        assert (code, "Authorization: Bearer" in told["error"]) == (401, True)
        assert guarded.ask("/docs")[0] == 401
        assert guarded.ask("/model", Authorization="Bearer wrong")[0] == 401
        known = {"Authorization": "Bearer secret"}
        assert guarded.ask("/model", **known)[0] == 200
        # While one question is being sent, no other may come where one may wait.
        first = begin(guarded, 8, **known)
        while b"bgen_requests_waiting 1" not in guarded.ask("/metrics", **known)[1]:
            pass
        code, told = guarded.ask("/generate", {"n": 1}, **known)
        assert (code, "come again" in told["error"]) == (429, True)
        first.send(b'"n": 1}')
        assert first.getresponse().status == 200
        first.close()
        assert guarded.ask("/generate", {"n": 1}, **known)[0] == 200
    done = bgen("serve", demo.model, "--host", "0.0.0.0")
    assert (done.code, "set BGEN_TOKEN" in done.err) == (2, True)
    answer = slow.getresponse()
    assert (answer.status, "within 5 s" in json.loads(answer.read())["error"]) == (408, True)
    slow.close()


def begin(server: Server, length: int, **headers: str) -> http.client.HTTPConnection:
    """Send the first of so many bytes of a question."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=120)
    connection.putrequest("POST", "/generate")
    for name, value in {"Content-Length": str(length), **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(b"{")
    return connection
