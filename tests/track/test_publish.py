"""What MLflow is told beside the metrics, and what can be sent later."""

from __future__ import annotations

import json
import shutil
import socket
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bgen.config.load import validate
from bgen.config.run import Config
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.track.environment import environment
from bgen.track.output import RunOutput
from bgen.track.publish import log_evaluation, log_model, sync

# SQLAlchemy deprecates what MLflow calls; as errors, these warnings would look like failures of the store.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DATA = {"store": "f" * 64, "genes": "a" * 64, "split": "train"}


def config(out: Path, uri: str) -> Config:
    tree: dict[str, Any] = {"stage": "vae", "out": out, "data": {"store": "atlas"}}
    tree["track"] = {"uri": uri, "progress": False}
    return validate(tree, Config, "test")


def train(out: Path, uri: str, world: World) -> None:
    output = RunOutput(config(out, uri), "identifier", None, world, deepspeed={"zero": 1}, data=DATA)
    output.event("start", 0, {"run": "identifier"})
    for step in range(1, 11):
        output.row("train", step, {"loss": 1.0 / step})
        output.row("hosts", step, {"node0/cpu_percent": 50.0, "own_s_max": 0.1})
    output.event("end", 10, {})
    output.close("FINISHED")


@pytest.fixture
def world() -> World:
    import torch

    return World(0, 1, 0, 1, torch.device("cpu"))


def test_after_an_outage_everything_can_be_sent(tmp_path: Path, world: World, empty_mlflow: Path) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{free.getsockname()[1]}"
    run = tmp_path / "run"
    train(run, away, world)
    with pytest.raises(UserError, match=f"MLflow at {away} does not answer"):
        sync(run)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert sync(run, uri).startswith(f"{run}: 30 new values at {uri}")
    assert sync(run, uri).startswith(f"{run}: 0 new values")
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("bgen").experiment_id])
    assert (found.info.status, found.data.tags["bgen.attempts"]) == ("FINISHED", "1")
    assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 10
    assert found.data.metrics["system/node0/cpu_percent"] == 50.0
    with pytest.raises(UserError, match="is not a run folder"):
        sync(tmp_path)


def test_what_a_run_is_made_of(tmp_path: Path, world: World, empty_mlflow: Path) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    run, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    train(run, uri, world)
    (found,) = client.search_runs([client.get_experiment_by_name("bgen").experiment_id])
    identifier = found.info.run_id
    assert found.data.params["train.zero"] == "1"
    assert found.data.params["fingerprint.genes"] == "a" * 64
    (used,) = found.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("atlas", "f" * 36)
    names = {Path(entry.path).name for entry in client.list_artifacts(identifier, "attempt_1")}
    assert names == {"config.yaml", "deepspeed.json", "environment.json"}
    assert json.loads((run / "environment.json").read_text())["packages"]

    (tmp_path / "report.html").write_text("<html>")
    child = client.get_run(log_evaluation(run, "test split", {"mmd": 0.5}, [tmp_path / "report.html"]))
    assert child.data.tags["mlflow.parentRunId"] == identifier
    assert (child.data.metrics, child.info.status) == ({"mmd": 0.5}, "FINISHED")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for version in ("1", "2"):
        assert log_model(run, model, register="atlas-flow").endswith("/model")
        assert client.get_model_version("atlas-flow", version).run_id == identifier
    assert [entry.path for entry in client.list_artifacts(identifier, "model")] == ["model/config.json"]


def test_environment_knows_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = environment()
    assert found["packages"] == sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()})
    assert found["variables"]["NCCL_DEBUG"] == "INFO"
    assert "secret" not in json.dumps(found)
    assert found["git"] is None or len(found["git"]["commit"]) == 40
