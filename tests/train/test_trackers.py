"""TensorBoard and Weights & Biases get what MLflow gets: all rows, once, over restarts; what is missing is told."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from toy import run, toy_config

from bgen.errors import UserError
from bgen.track import record

QUIET = {"mlflow": False, "progress": False}


def losses(path: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in record.read(path) if row["kind"] == "train"}


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="not installed: tensorboard")
def test_tensorboard_has_every_step_once_over_a_restart(tmp_path: Path) -> None:
    events: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = toy_config(tmp_path / "run", track={**QUIET, "tensorboard": True})
    run(config, stop_after=20)
    result, _ = run(config, resume=True)
    read = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found = read.Scalars("train/loss")
    assert [event.step for event in found] == list(losses(result.record))
    assert [event.value for event in found] == pytest.approx(list(losses(result.record).values()), rel=1e-6)
    assert "valid/nll" in read.Tags()["scalars"]
    assert "settings/text_summary" in read.Tags()["tensors"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="not installed: wandb")
def test_wandb_keeps_a_run_in_its_folder_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    result, _ = run(toy_config(tmp_path / "run", track={**QUIET, "wandb": True}))
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    identifier = record.read(result.record)[0]["run"]
    assert kept.name == f"run-{identifier}.wandb"
    assert kept.read_bytes().count(b"train/loss") >= len(losses(result.record))


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_told_before_training(
    tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgen.track.output.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"track.{tracker} needs .* pip install 'bgen-flow\[{tracker}\]'"):
        run(toy_config(tmp_path / "run", track={**QUIET, tracker: True}))
    assert not (tmp_path / "run" / "record.jsonl").exists()
