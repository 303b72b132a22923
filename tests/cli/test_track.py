"""The verbs that speak with MLflow after training, on a run that it has not heard of."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

# SQLAlchemy deprecates what MLflow calls; as errors, these warnings would look like failures of the store.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_record_model_and_scores_are_sent_later_and_scores_written_here(
    bgen: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path
) -> None:
    shutil.copy(empty_mlflow, tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    early = bgen("export", demo.flow, "--out", tmp_path / "early", "--log")
    assert early.code == 2
    assert "bgen track sync" in early.err
    sent = bgen("track", "sync", demo.vae, demo.flow)
    assert sent.code == 0, sent.err
    assert sent.out.count("new values at") == 2
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [client.get_experiment_by_name("bgen").experiment_id]
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert {name: run.info.status for name, run in runs.items()} == {"vae": "FINISHED", "flow": "FINISHED"}
    flow = runs["flow"].info.run_id
    rows = [json.loads(line) for line in (demo.flow / "record.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert [metric.value for metric in client.get_metric_history(flow, "train/loss")] == pytest.approx(losses)

    model = tmp_path / "model"
    exported = bgen("export", demo.flow, "--out", model, "--register", "blood")
    assert exported.code == 0, exported.err
    assert client.get_model_version("blood", "1").run_id == flow
    (logged,) = [entry.path for entry in client.list_artifacts(flow, "model")]
    names = {Path(entry.path).name for entry in client.list_artifacts(flow, logged)}
    assert names >= {"config.json", "model.safetensors", "MLmodel"}
    report = tmp_path / "report"
    scored = bgen("evaluate", model, "--data", demo.store, "--out", report, "--seeds", 2, "--run", demo.flow)
    assert scored.code == 0, scored.err
    assert "2-Wasserstein" in scored.out
    assert "ceiling" in scored.out
    assert (report / "report.html").stat().st_size > 50_000
    told = json.loads((report / "metrics.json").read_text())
    assert told["memorisation"]["found"] in (True, False)
    assert told["headline"].startswith("Asked for ")
    metrics = told["metrics"]
    assert {"model", "baseline", "ceiling", "verdict"} <= set(metrics["w2"])
    assert "| 2-Wasserstein" in (model / "README.md").read_text()
    (child,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{flow}'")
    assert child.data.metrics["w2/model"] == pytest.approx(metrics["w2"]["model"]["mean"])
    assert {entry.path for entry in client.list_artifacts(child.info.run_id)} == {"metrics.json", "report.html"}


def test_a_server_that_is_away_is_named(bgen: Any, demo: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{free.getsockname()[1]}"
    asked = bgen("track", "sync", demo.vae, "--uri", away)
    assert asked.code == 2
    assert f"MLflow at {away} does not answer" in " ".join(asked.err.split())
