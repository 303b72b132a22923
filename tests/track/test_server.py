"""The mirror against a real `mlflow server` that is stopped and continued while a run goes on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from bgen.config.load import validate
from bgen.config.run import Config
from bgen.distributed.world import World
from bgen.track.output import RunOutput
from bgen.track.publish import sync

LIMIT = 300.0
"""Seconds after which something hangs, on a busy machine too."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def server_command() -> str | None:
    """The full MLflow: of this environment (extra `mlflow`), or the one that BGEN_MLFLOW names."""
    if importlib.util.find_spec("flask") is not None:
        return shutil.which("mlflow", path=str(Path(sys.executable).parent))
    return os.environ.get("BGEN_MLFLOW")


@contextmanager
def postgresql() -> Iterator[str]:
    """Address of a database of a fresh PostgreSQL server."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *map(Path, os.environ["PATH"].split(os.pathsep))]
    binaries = next((folder for folder in found if (folder / "initdb").exists()), None)
    if binaries is None:
        pytest.skip("no PostgreSQL server")
    # It refuses to be run by root.
    user = "postgres" if os.geteuid() == 0 else None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="bgen-postgres-") as folder:
        if user is not None:
            shutil.chown(folder, user)
        common: dict[str, Any] = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        subprocess.run([binaries / "initdb", "-D", "data", "-U", "bgen", "-A", "trust"], check=True, **common)
        options = ["-D", "data", "-k", folder, "-p", port, "-c", "listen_addresses=127.0.0.1"]
        server = subprocess.Popen([binaries / "postgres", *options], stderr=subprocess.DEVNULL, **common)
        try:
            create = [binaries / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "bgen", "tracking"]
            deadline = time.monotonic() + LIMIT
            while subprocess.run(create, stderr=subprocess.DEVNULL, check=False, **common).returncode != 0:
                assert time.monotonic() < deadline
                assert server.poll() is None
                time.sleep(0.5)
            yield f"postgresql+psycopg2://bgen@127.0.0.1:{port}/tracking"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Address and process group of a server, with either database behind it."""
    command = server_command()
    if command is None:
        pytest.skip("no `mlflow server`: install the extra serve, or set BGEN_MLFLOW to the mlflow command of another")
    folder = tmp_path / "server"
    folder.mkdir()
    if request.param == "sqlite":
        with running(command, folder, f"sqlite:///{folder / 'db'}") as found:
            yield found
        return
    python = Path(command).with_name("python")
    if subprocess.run([python, "-c", "import psycopg2"], capture_output=True, check=False).returncode != 0:
        pytest.skip("the environment of `mlflow server` has no psycopg2")
    with postgresql() as database, running(command, folder, database) as found:
        yield found


@contextmanager
def running(command: str, folder: Path, database: str) -> Iterator[tuple[str, int]]:
    """A tracking server on a database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([command, *arguments], stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_answers(uri, folder / "log")
        yield uri, process.pid
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_until_it_answers(uri: str, log: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


def test_stopped_in_the_middle(tmp_path: Path, server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # The server may be as slow as the machine is busy; the end of the run does not wait so long in any case.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    uri, group = server
    tree = {"stage": "vae", "out": tmp_path / "run", "data": {"store": "atlas"}}
    config = validate({**tree, "track": {"uri": uri, "progress": False}}, Config, "test")
    client = MlflowClient(tracking_uri=uri)

    def history() -> int:
        experiment = client.get_experiment_by_name("bgen")
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        return len(client.get_metric_history(runs[0].info.run_id, "train/loss")) if runs else 0

    output = RunOutput(config, "identifier", None, World(0, 1, 0, 1, torch.device("cpu")), {}, {"store": "f" * 64})
    output.event("start", 0, {"run": "identifier"})
    for step in range(1, 51):
        output.row("train", step, {"loss": 1.0 / step})
    deadline = time.monotonic() + LIMIT
    while history() < 50 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert history() == 50
    os.killpg(group, signal.SIGSTOP)
    for step in range(51, 101):  # none of this waits for the server, which goes on only after it
        output.row("train", step, {"loss": 1.0 / step})
    output.event("end", 100, {})
    output.close("FINISHED")
    os.killpg(group, signal.SIGCONT)
    wait_until_it_answers(uri, tmp_path / "server" / "log")
    sync(tmp_path / "run")
    assert history() == 100
    (run,) = client.search_runs([client.get_experiment_by_name("bgen").experiment_id])
    assert run.info.status == "FINISHED"
    assert {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "attempt_1")} >= {"config.yaml"}
