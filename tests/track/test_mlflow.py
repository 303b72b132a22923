"""The mirror against a real sqlite store, against a closed port, and against a server that never answers."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bgen.track.mirror import Mirror
from bgen.track.mlflow import RUN_TAG, flatten, tracking_uri
from bgen.track.record import Record, truncate
from bgen.track.target import Target

# SQLAlchemy deprecates what MLflow calls; as errors, these warnings would look like failures of the store.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def mirror(folder: Path, uri: str) -> Mirror:
    (folder / "config.yaml").write_text("stage: vae\n")
    params = {f"p{number}": "x" * 7000 for number in range(120)}
    record, config = str(folder / "record.jsonl"), str(folder / "config.yaml")
    return Mirror(Target(record, uri, "bgen", "run", "identifier", params, [config]))


def write(record: Record, steps: range) -> None:
    for step in steps:
        record.append("train", step, {"loss": 1.0 / step, "lr": 0.1})
        record.append("event", step, {"event": "something", "count": 3})
    record.append("valid", steps[-1], {"nll": 2.0 / steps[-1], "kl": None})


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


def test_sqlite_receives_everything_once_over_restarts(tmp_path: Path, empty_mlflow: Path) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    uri = tracking_uri(None, tmp_path / "run")
    assert uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    record = Record(tmp_path / "record.jsonl")
    first = mirror(tmp_path, uri)
    write(record, range(1, 501))
    assert first.close("KILLED") is None
    # Killed at step 500, resumed from step 300: these steps come again.
    record.close()
    truncate(tmp_path / "record.jsonl", 300)
    record = Record(tmp_path / "record.jsonl")
    second = mirror(tmp_path, uri)
    write(record, range(301, 601))
    assert second.close("FINISHED") is None
    record.close()

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("bgen")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags[RUN_TAG] == "identifier"
    assert run.data.tags["bgen.attempts"] == "2"
    assert len(run.data.params) == 120
    history = sorted(client.get_metric_history(run.info.run_id, "train/loss"), key=lambda metric: metric.step)
    assert [metric.step for metric in history] == list(range(1, 601))
    assert history[9].value == pytest.approx(0.1)
    assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "valid/nll")} == {
        500: 2.0 / 500,
        600: 2.0 / 600,
    }
    assert set(run.data.metrics) == {"train/loss", "train/lr", "valid/nll"}
    assert [entry.path for entry in client.list_artifacts(run.info.run_id)] == ["attempt_1", "attempt_2"]
    assert (tmp_path / "mlartifacts").is_dir()


def test_a_closed_port_costs_nothing(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    record = Record(tmp_path / "record.jsonl")
    target = mirror(tmp_path, uri)
    target._process.send_signal(signal.SIGSTOP)  # writing waits for nothing that this process does
    write(record, range(1, 200))
    target._process.send_signal(signal.SIGCONT)
    complaint = target.close("FINISHED")
    assert complaint is not None
    assert "did not receive everything" in complaint
    assert f"The record is complete: {tmp_path / 'record.jsonl'}" in complaint
    record.close()


def test_a_server_that_never_answers_does_not_hold_the_end_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bgen.track.mirror.CLOSE_SERVER", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        record = Record(tmp_path / "record.jsonl")
        target = mirror(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        write(record, range(1, 5))
        silent.settimeout(600)
        with silent.accept()[0]:  # it has asked, and waits
            assert target.close("FINISHED") is not None  # MLflow itself would wait for some twenty minutes
            assert target._process.poll() is not None
        record.close()


def test_it_ends_with_the_trainer_and_not_before(tmp_path: Path, empty_mlflow: Path) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    Record(tmp_path / "record.jsonl").close()
    trainer = """
import signal, sqlite3, sys, time
from contextlib import closing, suppress
from pathlib import Path
import bgen.track.mirror
from bgen.track.mirror import Mirror
from bgen.track.record import Record
from bgen.track.target import Target
bgen.track.mirror.NICENESS = 0  # or it would wait for minutes on a busy machine
folder = Path(sys.argv[1])
mirror = Mirror(Target(str(folder / "record.jsonl"), f"sqlite:///{folder / 'mlflow.db'}", "e", "r", "i", {}, []))
def arrived(table):
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, suppress(sqlite3.OperationalError):
        return database.execute(f"select count(*) from {table}").fetchone()[0]
    return 0
while not arrived("runs"):  # then it is past its start
    time.sleep(0.1)
mirror._process.send_signal(signal.SIGTERM)
Record(folder / "record.jsonl").append("train", 1, {"loss": 1.0})
while mirror._process.poll() is None and not arrived("metrics"):
    time.sleep(0.1)
print(mirror._process.pid, mirror._process.poll(), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", trainer, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, ended = process.stdout.readline().split()
        process.kill()
    assert ended == "None"
    deadline = time.monotonic() + 300
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_where_the_run_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert tracking_uri(None, tmp_path) == "http://server"
    assert tracking_uri("http://other", tmp_path) == "http://other"


def test_flatten() -> None:
    assert flatten(json.loads('{"a": {"b": 1, "c": [1, 2]}, "d": null}')) == {"a.b": "1", "a.c": "[1, 2]", "d": "None"}
