"""The loop on one rank: a resumed run is the same run, and everything that can end it ends it cleanly."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy import ToyModel, ToyStage, run, toy_config

from bgen.checkpoint import files, shards
from bgen.checkpoint.weights import export_weights
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.track import record
from bgen.train.engine.engine import Engine
from bgen.train.trainer import Trainer, TrainResult

FULL = {"ema": 0.9, "patience": 30, "eval_every": 4, "schedule": "cosine", "log_every": 10}


def rows_of(path: Path, kind: str) -> list[dict[str, Any]]:
    """Rows without what depends on the clock and the machine."""
    varying = {"time", "cells_per_s", "nonzeros_per_s", "data_wait", "memory_gb"}
    return [{k: v for k, v in row.items() if k not in varying} for row in record.read(path) if row["kind"] == kind]


def failing(stage: ToyStage, at: int) -> Callable[[int], Iterator[Sequence[CellBatch]]]:
    """The stage's batches, with a fault in one step."""
    drawn = stage.train_batches

    def batches(start: int) -> Iterator[Sequence[CellBatch]]:
        for step, found in enumerate(drawn(start), start):
            if step == at:
                raise RuntimeError("a fault")
            yield found

    return batches


def stopping(stage: ToyStage, after: int) -> Callable[[int], Iterator[Sequence[CellBatch]]]:
    """The stage's batches, with a SIGTERM to this process when so many steps' have been drawn."""
    drawn = stage.train_batches

    def batches(start: int) -> Iterator[Sequence[CellBatch]]:
        for step, found in enumerate(drawn(start), start):
            if step == after - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    return batches


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("settings", [
    pytest.param({"zero": 0}, marks=pytest.mark.slow),
    pytest.param({"zero": 1, **FULL}, marks=pytest.mark.slow),
    {"zero": 0, "micro_batch": 2, **FULL},
])  # fmt: skip
def test_stopped_at_25_and_resumed_is_the_uninterrupted_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    straight, whole = run(toy_config(tmp_path / "straight", settings), dropout=0.1)
    config = toy_config(tmp_path / "halves", settings | {"checkpoint_every": 100})
    first, unfinished = run(config, stop_after=25, dropout=0.1)
    assert (first.interrupted, first.step, unfinished.finished) == (True, 25, [])
    second, halves = run(config, resume=True, dropout=0.1)
    assert first.losses + second.losses == straight.losses
    assert second.best == straight.best
    assert same(whole.module, halves.module)
    assert halves.finished == [halves.module]
    for kind in ("train", "valid"):
        assert rows_of(straight.record, kind) == rows_of(second.record, kind)


def test_training_learns(tmp_path: Path) -> None:
    result, _ = run(toy_config(tmp_path / "run", {"steps": 150, "eval_every": 25}))
    valid = rows_of(result.record, "valid")
    assert valid[-1]["nll"] < 0.8 * valid[0]["nll"]
    assert valid[-1]["loss"] == pytest.approx(valid[-1]["nll"] + 0.01)
    assert result.best == min(row["nll"] for row in valid)


def test_early_stop_leaves_the_best_weights(tmp_path: Path) -> None:
    # Enough of a learning rate to get worse again.
    settings = {"steps": 400, "eval_every": 5, "patience": 3, "learning_rate": 0.5, "clip": 0}
    config = toy_config(tmp_path / "run", settings)
    result, stage = run(config)
    assert result.stopped_early
    assert result.step < 400
    again = ToyStage(toy_config(tmp_path / "again", {"steps": 1}))
    again.module.load_state_dict(stage.module.state_dict())
    with torch.no_grad():
        batches = list(again.valid_batches())
        total = sum(float((again.module(batch)["nll"] * weight).sum()) for batch, weight in batches)
    assert total / 30 == pytest.approx(result.best, rel=1e-6)
    weights, folder = export_weights(tmp_path / "run" / "checkpoints")
    assert files.step_of(folder) == result.step
    assert weights.keys() == stage.module.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in stage.module.state_dict().items())
    resumed, once_more = run(config, resume=True)
    assert (resumed.losses, resumed.stopped_early, resumed.step) == ([], True, result.step)
    assert same(stage.module, once_more.module)


def test_the_moving_average_is_exported(tmp_path: Path) -> None:
    result, stage = run(toy_config(tmp_path / "run", {"steps": 6, "ema": 0.5}))
    weights, _ = export_weights(tmp_path / "run" / "checkpoints")
    assert all(torch.equal(weights[name], value) for name, value in stage.module.state_dict().items())
    plain, other = run(toy_config(tmp_path / "plain", {"steps": 6}))
    assert plain.losses == result.losses
    assert not same(stage.module, other.module)


@pytest.mark.parametrize("zero", [0, 1])
def test_bf16_keeps_float32_parameters(tmp_path: Path, zero: int) -> None:
    exact, _ = run(toy_config(tmp_path / "exact", {"steps": 10, "zero": zero}))
    result, stage = run(toy_config(tmp_path / "run", {"steps": 10, "zero": zero, "precision": "bf16"}))
    assert {p.dtype for p in stage.module.parameters()} == {torch.float32}
    assert result.losses != exact.losses
    assert result.losses == pytest.approx(exact.losses, rel=0.1)


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "bf16"), pytest.param(1, "pure_bf16", marks=pytest.mark.slow), (3, "pure_bf16")]
)
def test_frozen_parameters_are_exported_as_they_came(tmp_path: Path, zero: int, precision: str) -> None:
    settings = {"steps": 4, "zero": zero, "precision": precision}
    stage = ToyStage(toy_config(tmp_path / "run", settings))
    frozen = stage.module.frozen = torch.nn.Linear(3, 5).requires_grad_(False)
    before = {f"frozen.{name}": tensor.clone() for name, tensor in frozen.state_dict().items()}
    Trainer(stage.config, stage).fit()
    exported, _ = export_weights(tmp_path / "run" / "checkpoints")
    for state in (stage.module.state_dict(), exported):
        for name, tensor in before.items():
            assert state[name].dtype == torch.float32
            assert torch.equal(state[name], tensor)


def test_too_many_steps_that_are_not_finite(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"max_skipped": 3})
    stage = ToyStage(config)
    assert isinstance(stage.module, ToyModel)

    def poison(batch: CellBatch) -> Tensor | None:
        return torch.full((len(batch),), torch.nan) if batch.step in (2, 3, 7, 8, 9) else None

    stage.module.poison = poison
    with pytest.raises(
        UserError,
        match=r"3 steps in a row had a loss that was not finite, the last was step 10, first in ToyModel itself\.",
    ):
        Trainer(config, stage).fit()
    skipped = [row for row in rows_of(tmp_path / "run" / "record.jsonl", "event") if row["event"] == "skipped"]
    assert [row["step"] for row in skipped] == [3, 4, 8, 9, 10]
    assert skipped[0]["cells"] == list(range(2000, 2008))
    assert skipped[0]["first"] == "ToyModel itself"


def test_a_damaged_checkpoint_is_passed_over_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path / "run", {"steps": 30, "checkpoint_every": 10})
    straight, _ = run(config)
    kept = files.committed(tmp_path / "run" / "checkpoints")
    assert [files.step_of(folder) for folder in kept] == [30, 20]
    shard = kept[0] / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    result, _ = run(config, resume=True)
    said = capsys.readouterr().err.strip().splitlines()
    damaged = f"checkpoint step_00000030 is damaged ({shard.name}: checksum differs)"
    assert said == [f"{damaged}: going on from step_00000020 instead"]
    assert result.losses == straight.losses[20:]
    for folder in files.committed(tmp_path / "run" / "checkpoints"):
        (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"No checkpoint in .* is usable: .*state\.json: missing"):
        run(config, resume=True)


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"steps": 2})
    run(config)
    with pytest.raises(UserError, match=r"already holds a run\. Give --resume"):
        run(config)
    stage = ToyStage(config)
    stage.fingerprint = {"store": "another"}
    with pytest.raises(UserError, match=r"other data, so the run cannot go on:\n  store: was toy, is another"):
        Trainer(config, stage).fit(resume=True)
    stage = ToyStage(toy_config(tmp_path / "run", {"steps": 3}))
    stage.fingerprint = {"store": "another"}
    assert Trainer(stage.config, stage).fit(resume=True, accept_changed_data=True).step == 3
    stage = ToyStage(toy_config(tmp_path / "run", {"zero": 1, "optimizer": "muon"}))
    stage.fingerprint = {"store": "another"}
    with pytest.raises(UserError, match=r"set train\.optimizer=adamw, or start"):
        Trainer(stage.config, stage).fit(resume=True)


def test_another_model_than_the_checkpoint_holds_is_named(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"steps": 2})
    run(config)
    wider, longer = ToyStage(config), ToyStage(config)
    assert isinstance(wider.module, ToyModel)
    assert isinstance(longer.module, ToyModel)
    wider.module.body[0] = torch.nn.Linear(8, 17)
    longer.module.body.append(torch.nn.Linear(1, 1))
    for stage, line in (
        (wider, r"  body\.0\.bias: there \(16,\), here \(17,\)"),
        (longer, r"  body\.5\.bias: there None, here \(1,\)"),
    ):
        with pytest.raises(UserError, match=rf"holds another model than this run's \(2 parameters differ\):\n{line}\n"):
            Trainer(config, stage).fit(resume=True)


def test_resume_before_the_first_checkpoint_starts_the_same_run(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"steps": 3})
    straight, _ = run(config)
    identifier = record.read(straight.record)[0]["run"]
    for folder in files.committed(tmp_path / "run" / "checkpoints"):
        files.remove(folder)
    again, _ = run(config, resume=True)
    assert again.losses == straight.losses
    assert record.read(again.record)[0]["run"] == identifier


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(obj: object, path: object, **options: bool) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", full)
        result, _ = run(toy_config(tmp_path / "run", {"steps": 4, "checkpoint_every": 2}))
    assert result.step == 4
    assert "warning: no checkpoint: rank 0 could not write" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_metric_that_is_not_finite_beside_a_finite_loss_changes_nothing(tmp_path: Path) -> None:
    class Metric(ToyModel):
        def forward(self, batch: CellBatch) -> dict[str, Tensor]:
            found = super().forward(batch)
            return found | {"nll": found["nll"] * (torch.nan if batch.step == 3 else 1.0)}

    def train(out: Path, resume: bool, stop_after: int = 0) -> TrainResult:
        config = toy_config(out, {"steps": 12, "checkpoint_every": 5, "log_every": 10, "eval_every": 0})
        stage = ToyStage(config)
        torch.manual_seed(config.seed)
        stage.module = Metric(0.0)
        if stop_after:
            stage.train_batches = stopping(stage, stop_after)  # type: ignore[method-assign]
        return Trainer(config, stage).fit(resume)

    straight = train(tmp_path / "straight", resume=False)
    first = train(tmp_path / "halves", resume=False, stop_after=6)
    second = train(tmp_path / "halves", resume=True)
    assert first.losses + second.losses == straight.losses
    rows = [rows_of(result.record, "train") for result in (straight, second)]
    assert rows[0] == rows[1]
    assert [row["nll"] is None for row in rows[0]] == [True, False]


@pytest.mark.parametrize(("zero", "copies"), [(0, False), (1, False), (3, True)])
def test_frozen_parameters_are_copied_only_where_they_do_not_stay_whole(
    tmp_path: Path, zero: int, copies: bool
) -> None:
    """A copy would cost every rank of a host as much memory again."""
    config = toy_config(tmp_path / "run", {"zero": zero})
    stage = ToyStage(config)
    frozen = stage.module.frozen = torch.nn.Linear(3, 5).requires_grad_(False)
    weight = frozen.weight.clone()
    engine = Engine(stage.module, config.train, stage.world)
    held = engine.frozen()
    assert held.keys() == {"frozen.weight", "frozen.bias"}
    assert torch.equal(held["frozen.weight"], weight)
    assert (
        held["frozen.weight"].data_ptr() != dict(engine.module.named_parameters())["frozen.weight"].data_ptr()
    ) == copies
    engine.release()


def test_frozen_parameters_are_saved_once(tmp_path: Path) -> None:
    def train(steps: int, resume: bool = False) -> tuple[TrainResult, ToyStage]:
        stage = ToyStage(toy_config(tmp_path / "run", {"steps": steps, "checkpoint_every": 2, "keep": 3}))
        stage.module.frozen = torch.nn.Linear(300, 50).requires_grad_(False)
        torch.nn.init.ones_(stage.module.frozen.weight)
        torch.nn.init.zeros_(stage.module.frozen.bias)
        return Trainer(stage.config, stage).fit(resume), stage

    root = tmp_path / "run" / "checkpoints"
    train(6)
    train(8, resume=True)
    kept = files.committed(root)
    assert [files.step_of(folder) for folder in kept] == [8, 6, 4]
    assert len({(folder / shards.FROZEN).stat().st_ino for folder in kept}) == 1
    assert all((folder / "shard_00000.safetensors").stat().st_size < 40_000 for folder in kept)
    assert all(files.damage(folder) is None for folder in kept)
    exported, _ = export_weights(root)
    assert torch.equal(exported["frozen.weight"], torch.ones(50, 300))
    # As before format 3: all in the share of rank 0.
    (kept[0] / shards.FROZEN).write_bytes(b"damaged")  # the file of all three
    assert all(files.damage(folder) is not None for folder in kept)


def test_checkpoints_with_frozen_parameters_in_rank_0s_share_are_resumed(tmp_path: Path) -> None:
    """Format 2, which had no file for them."""

    def train(out: Path, steps: int, resume: bool = False) -> tuple[TrainResult, ToyStage]:
        stage = ToyStage(toy_config(out, {"steps": steps, "checkpoint_every": 100}))
        stage.module.frozen = torch.nn.Linear(3, 5).requires_grad_(False)
        if resume:  # what the checkpoint has is what counts
            torch.nn.init.zeros_(stage.module.frozen.weight)
        return Trainer(stage.config, stage).fit(resume), stage

    straight, whole = train(tmp_path / "straight", 6)
    train(tmp_path / "run", 4)
    (folder,) = files.committed(tmp_path / "run" / "checkpoints")
    saved, manifest = shards.Shards(folder), files.read_manifest(folder)
    parts = [load_file(folder / name) for name in ("shard_00000.safetensors", shards.FROZEN)]
    share = {name: tensor.clone() for part in parts for name, tensor in part.items()}
    (folder / shards.FROZEN).unlink()
    del manifest["files"][shards.FROZEN]
    manifest["files"]["shard_00000.safetensors"] = shards.write(
        folder / "shard_00000.safetensors", share, dict(saved.shapes)
    )
    files.write_synced(folder / files.MANIFEST, json.dumps(manifest | {"format": 2}))
    files.write_synced(folder / files.MARKER, files.sha256(folder / files.MANIFEST))
    second, halves = train(tmp_path / "run", 6, resume=True)
    assert second.losses == straight.losses[4:]
    assert same(whole.module, halves.module)
    assert (files.committed(tmp_path / "run" / "checkpoints")[0] / shards.FROZEN).exists()


def test_restarts_without_a_new_checkpoint_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path / "run", {"steps": 10, "checkpoint_every": 100, "max_restarts": 2})
    said = []
    for attempt in range(4):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        stage = ToyStage(config)
        stage.train_batches = failing(stage, 3)  # type: ignore[method-assign]
        with pytest.raises((RuntimeError, UserError)) as raised:
            Trainer(config, stage).fit(resume=True)
        said.append(str(raised.value))
    assert said[:3] == ["a fault"] * 3
    assert "was restarted 3 times in a row without a new checkpoint (train.max_restarts=2)" in said[3]


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.patience=2 needs held-out losses"):
        ToyStage(toy_config(tmp_path, {"patience": 2, "eval_every": 0}))
    config = toy_config(tmp_path / "run", {"steps": 1})
    stage = ToyStage(config)
    stage.monitor = "null"
    with pytest.raises(UserError, match=r"no 'null' to watch\. Did you mean 'nll'"):
        Trainer(config, stage).fit()
