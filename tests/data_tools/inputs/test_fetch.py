"""Inputs at addresses: the same store as from files, copied once, and what is refused."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from servers import find_moto, put, serve, serve_s3, upload

from bgen.config.data import Access
from bgen.errors import UserError
from bgen.store.remote import RemoteFiles
from data_tools.inputs import fetch
from data_tools.inputs.fetch import on_this_machine
from data_tools.simulate.simulate import simulate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    cells = simulate("tiny", cells=200)
    cells.write_h5ad(made / "cells.h5ad")
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    if (program := find_moto()) is None:
        pytest.skip("needs moto[s3,server]")
    with serve_s3(program) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield url


def fingerprint(bgen: Any, source: object, out: Path) -> str:
    from bgen.store.store import Store

    done = bgen("data", "build", source, "--out", out)
    assert done.code == 0, done
    return Store(out).fingerprint


def test_a_build_from_an_address_is_that_from_the_file(bgen: Any, folder: Path, tmp_path: Path) -> None:
    local = fingerprint(bgen, folder / "cells.h5ad", tmp_path / "local")
    with serve(folder) as server:
        assert fingerprint(bgen, f"{server.url}/cells.h5ad", tmp_path / "remote") == local
        copy = on_this_machine(f"{server.url}/cells.h5ad")
        assert copy.read_bytes() == (folder / "cells.h5ad").read_bytes()
        before = copy.stat()
        assert bgen("data", "check", f"{server.url}/cells.h5ad").code == 0
        assert copy.stat().st_ino == before.st_ino  # it is not copied again


def test_a_file_that_changed_is_copied_again(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PIECE", 1000)
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as server:
        for text in (b"a" * 12_345, b"b" * 999, b""):
            (tmp_path / "served/x.h5ad").write_bytes(text)
            assert on_this_machine(f"{server.url}/x.h5ad").read_bytes() == text
    assert len(list((cache / "bgen/inputs").iterdir())) == 3


def test_files_and_folders_of_s3_are_read(bgen: Any, folder: Path, s3: str, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(folder / "cells.h5ad")
    plain = {"obs": cells.obs[["cell_type"]], "var": cells.var[[]], "uns": {"organism": cells.uns["organism"]}}
    cells = anndata.AnnData(cells.X, **plain)  # a few dozen files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions of zarr
        cells.write_zarr(tmp_path / "cells.zarr")
    upload(tmp_path / "cells.zarr", f"{s3}/atlas/in/cells.zarr")
    put(f"{s3}/atlas/in/cells.h5ad", (folder / "cells.h5ad").read_bytes())
    with ThreadPoolExecutor(2) as pool:  # at once
        assert len(set(pool.map(on_this_machine, ["s3://atlas/in/cells.zarr"] * 2))) == 1
    for name in ("cells.zarr", "cells.h5ad"):
        copy = on_this_machine(f"s3://atlas/in/{name}")
        found = anndata.read_zarr(copy) if name.endswith(".zarr") else anndata.read_h5ad(copy)
        assert np.array_equal(found.X.toarray(), cells.X.toarray())
        assert on_this_machine(f"s3://atlas/in/{name}") == copy
        done = bgen("data", "check", f"s3://atlas/in/{name}")
        assert done.code == 0, done
    with pytest.raises(UserError, match=r"s3://atlas/in/none\.h5ad: there is no store and no file"):
        on_this_machine("s3://atlas/in/none.h5ad")
    with pytest.raises(UserError, match=r"s3://atlas/none\.zarr: there is nothing"):
        on_this_machine("s3://atlas/none.zarr")


def test_a_verb_takes_cells_at_an_address(bgen: Any, demo: Any, tmp_path: Path) -> None:
    with serve(demo.folder) as server:
        for name in ("cells.h5ad", "store"):
            done = bgen("embed", demo.model, f"{server.url}/{name}", "--out", tmp_path / f"{name}.out.h5ad")
            assert done.code == 0, done
    first, second = (anndata.read_h5ad(tmp_path / f"{name}.out.h5ad") for name in ("cells.h5ad", "store"))
    rows = second.obs_names.get_indexer(first.obs_names)
    np.testing.assert_allclose(first.obsm["X_bgen"], second.obsm["X_bgen"][rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("az://bucket/x.h5ad", "bgen reads s3://, gs://, http:// and https://, not az://"),
        ("{url}/none.h5ad", "there is no store and no file of that name"),
        ("{url}/cells.zarr", "a folder at an http address cannot be listed"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(
    bgen: Any, demo: Any, folder: Path, tmp_path: Path, where: str, said: str
) -> None:
    with serve(folder) as server:
        where = where.format(url=server.url)
        for asked in (["data", "check", where], ["embed", demo.model, where, "--out", tmp_path / "x.h5ad"]):
            done = bgen(*asked)
            assert done.code == 2
            assert said in " ".join((done.err + done.out).split())
            assert "Traceback" not in done.err


class Recorder(BaseHTTPRequestHandler):
    """Answers every request with the same five bytes, and keeps its headers."""

    heard: list[dict[str, str]]

    def do_GET(self) -> None:
        self.heard.append({name.lower(): value for name, value in self.headers.items()} | {"path": self.path})
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(b"bytes")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_the_one_who_pays_is_told_to_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[dict[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Recorder,), {"heard": heard}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    try:
        for payer in (None, "my-project"):
            access = Access(requester_pays=payer, retries=0)
            assert RemoteFiles("gs://bucket/folder", access).read("x") == b"bytes"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert ["my-project" in request["path"] for request in heard] == [False, True]
    with pytest.raises(UserError, match="a project that pays is for gs:// alone"):
        RemoteFiles("s3://bucket/folder", Access(requester_pays="my-project"))
