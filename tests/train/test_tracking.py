"""MLflow behind the trainer: it receives the run, and its absence changes nothing."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from toy import run, toy_config

from bgen.track import record
from bgen.track.mlflow import RUN_TAG

# SQLAlchemy deprecates what MLflow calls; as errors, these warnings would look like failures of the store.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("from_the_start", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_run_on_sqlite_over_a_restart(
    from_the_start: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path
) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = toy_config(tmp_path / "toy_run", track={"mlflow": True, "checkpoints": True})
    first = toy_config(tmp_path / "toy_run", track={"mlflow": from_the_start, "checkpoints": True})
    run(first, stop_after=25)
    result, _ = run(config, resume=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("bgen").experiment_id])
    assert (found.info.run_name, found.info.status) == ("toy_run", "FINISHED")
    assert found.data.tags[RUN_TAG] == record.read(result.record)[0]["run"]
    assert found.data.tags["bgen.attempts"] == ("2" if from_the_start else "1")
    assert found.data.params["train.global_batch"] == "8"
    history = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "train/loss")}
    rows = {row["step"]: row["loss"] for row in record.read(result.record) if row["kind"] == "train"}
    assert history == pytest.approx(rows)
    assert len(history) == 50
    valid = {row["step"]: row["nll"] for row in record.read(result.record) if row["kind"] == "valid"}
    assert {m.step: m.value for m in client.get_metric_history(found.info.run_id, "valid/nll")} == pytest.approx(valid)
    last = "checkpoints/step_00000050"
    logged = {entry.path for entry in client.list_artifacts(found.info.run_id, last)}
    here = {f"{last}/{path.name}" for path in (config.out / last).iterdir()}
    assert logged == here
    assert len(logged) > 2


@pytest.mark.slow
def test_a_closed_port_neither_slows_nor_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without, _ = run(toy_config(tmp_path / "without"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    begin = time.monotonic()
    result, _ = run(toy_config(tmp_path / "with", track={"mlflow": True, "uri": uri}))
    assert result.losses == without.losses
    assert time.monotonic() - begin < 600  # MLflow itself tries for minutes, once for each row
    assert "MLflow at http://127.0.0.1" in capsys.readouterr().err
