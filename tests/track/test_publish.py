"""What MLflow is told beside the metrics, and what can be sent later."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bgen.config.load import validate
from bgen.config.run import Config
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.serve.pyfunc import SERVED
from bgen.track import output
from bgen.track.environment import environment, git_state
from bgen.track.mirror import Mirror
from bgen.track.mlflow import prepare
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


def test_after_an_outage_everything_can_be_sent_and_a_password_is_in_no_file(
    tmp_path: Path,
    world: World,
    empty_mlflow: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = f"127.0.0.1:{free.getsockname()[1]}"
    secret = f"http://ann:hush-hush@{away}"
    run = tmp_path / "run"
    targets = []
    monkeypatch.setattr(output, "Mirror", lambda target: targets.append(target) or Mirror(target))
    train(run, secret, world)
    said = capsys.readouterr().err
    assert targets[0].uri == secret
    assert "hush-hush" not in json.dumps(targets[0].params)
    assert f"MLflow at http://{away} did not receive everything" in said
    assert "hush-hush" not in said
    for path in run.rglob("*"):
        assert path.is_dir() or b"hush-hush" not in path.read_bytes(), path
    for again in (None, secret):
        with pytest.raises(UserError, match=f"MLflow at http://{away} does not answer") as raised:
            sync(run, again)
        assert "hush-hush" not in str(raised.value)
    assert config(run, secret).track.uri == secret
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
        (model / "config.json").write_text(f'{{"version": {version}}}')
        source = log_model(run, model, SERVED, register="atlas-flow")
        assert client.get_model_version("atlas-flow", version).source == source
        assert client.get_model_version("atlas-flow", version).run_id == identifier
    first, second = [entry.path for entry in client.list_artifacts(identifier, "model")]
    for folder in (first, second):  # neither was written over
        names = {Path(entry.path).name for entry in client.list_artifacts(identifier, folder)}
        assert names == {"config.json", "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}


def test_the_environment_tells_what_decides_a_run_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_NTHREADS", "256")
    for name in ("AWS_SECRET_ACCESS_KEY", "BGEN_ANYTHING", "TORCH_HUB_LOGIN", "NCCL_PLUGIN_ARGS", "DS_REMOTE"):
        monkeypatch.setenv(name, "hush-hush")
    monkeypatch.setattr("sys.argv", ["bgen", "train", "x", "track.uri=https://ann:hush-hush@mlflow.example"])
    found = environment()
    assert found["packages"] == sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()})
    shown = {name: found["variables"][name] for name in ("NCCL_DEBUG", "NCCL_NTHREADS", "BGEN_ANYTHING")}
    assert shown == {"NCCL_DEBUG": "INFO", "NCCL_NTHREADS": "256", "BGEN_ANYTHING": "(set)"}
    assert "hush-hush" not in json.dumps(found)
    assert found["command"][-1] == "track.uri=https://mlflow.example"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's repository with a change that is not committed."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    folder = tmp_path / "project"
    (folder / "venv" / "bgen").mkdir(parents=True)
    (folder / "bgen").mkdir()
    (folder / "notes.txt").write_text("old\n")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    (folder / "notes.txt").write_text("hush-hush\n")
    return folder


def test_a_repository_that_bgen_only_lies_in_is_nobodys_business(repository: Path) -> None:
    assert git_state(repository / "venv" / "bgen") is None
    assert git_state(repository / "bgen") is None
    (repository / "venv" / "pyproject.toml").write_text('[project]\nname = "bgen-flow"\n')
    assert git_state(repository / "venv" / "bgen") is None, "its top is another folder"


def test_of_a_checkout_of_bgen_the_commit_is_told_and_not_the_changes(repository: Path) -> None:
    (repository / "pyproject.toml").write_text('[project]\nname = "bgen-flow"\n')
    found = git_state(repository / "bgen")
    assert found is not None
    assert (len(found["commit"]), found["dirty"], len(found["changes_sha256"])) == (40, True, 64)
    assert "hush-hush" not in json.dumps(found)
    (repository / "notes.txt").write_text("old\n")
    again = git_state(repository / "bgen")
    assert again == found | {"dirty": False, "changes_sha256": None}


def test_mlflow_tells_its_makers_nothing_unless_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    prepare()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"
    code = (
        "from bgen.track.mlflow import MlflowRun\nfrom bgen.track.target import Target\n"
        "MlflowRun(Target('r', 'sqlite://', '', '', '', {}, [])).client()\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled as off; print(off())"
    )
    others = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS")
    variables = {name: value for name, value in os.environ.items() if name not in others}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"
