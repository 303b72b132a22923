"""Disks that are full or read-only, stores that are away or damaged, locks that were left: one process each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import environment
from prefork import python
from torch import Tensor
from toy import ToyStage, run, toy_config

from bgen.checkpoint import commit, files, shards
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.track import record
from bgen.train.saving import SaveFailed
from bgen.train.trainer import Trainer


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    (folder / "filler").write_bytes(b"\0" * (shutil.disk_usage(folder).free - leave))


def fill_to_the_last_byte(folder: Path) -> None:
    with (folder / "filler").open("wb", 0) as filler:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * size)


def test_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 6: training goes on without the checkpoint; where it must save and cannot, it exits with 75."""
    fill(small_disk, 170_000)
    settings = {"steps": 6, "checkpoint_every": 2, "zero": 1}
    result, _ = run(toy_config(small_disk / "run", settings))
    assert result.step == 6
    said = capsys.readouterr().err
    assert "warning: no checkpoint: no space: need 0.2" in said
    assert " MB, have 0.1" in said
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []
    with pytest.raises(SaveFailed, match=r"stopped at step 3 without saving: no space: need 0\.2"):
        run(toy_config(small_disk / "stopped", settings), stop_after=3)
    assert SaveFailed.exit_code == 75


def test_disk_that_fills_up_while_a_checkpoint_is_written(
    small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    config = toy_config(small_disk / "run", {"steps": 4, "checkpoint_every": 2})
    stage = ToyStage(config)
    stage.module.register_buffer("ballast", torch.zeros(10**6))
    assert Trainer(config, stage).fit().step == 4
    said = capsys.readouterr().err
    assert said.count("warning: no checkpoint: rank 0 could not write") == 2
    assert "No space left on device" in said
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []


def test_a_disk_that_is_full_to_the_last_byte_costs_a_warning_and_an_interval(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something else fills the disk in step 12 and leaves it in step 22; the record has every row in the end."""
    settings = {"steps": 30, "checkpoint_every": 5, "eval_every": 0, "zero": 1, "checkpoint_async": False}
    straight, _ = run(toy_config(small_disk / "straight", settings))
    shutil.rmtree(small_disk / "straight")
    config = toy_config(small_disk / "run", settings)
    stage = ToyStage(config)
    drawn = stage.train_batches

    def batches(start: int) -> Iterator[Sequence[CellBatch]]:
        for step, found in enumerate(drawn(start), start):
            if step == 12:
                fill_to_the_last_byte(small_disk)
            if step == 22:
                (small_disk / "filler").unlink()
            yield found

    stage.train_batches = batches  # type: ignore[method-assign]
    result = Trainer(config, stage).fit()
    assert result.losses == straight.losses
    said = capsys.readouterr().err
    assert said.count("record.jsonl cannot be written (No space left on device): training goes on, rows are kept") == 1
    assert said.count("warning: no checkpoint: no space: need ") == 2
    rows = [row["step"] for row in record.read(result.record) if row["kind"] == "train"]
    assert rows == list(range(1, 31))
    assert [files.step_of(folder) for folder in files.committed(small_disk / "run" / "checkpoints")] == [30, 25]


def test_a_disk_that_never_takes_a_checkpoint_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(shards, "write", full)
    settings = {"steps": 50, "checkpoint_every": 2, "max_failed_saves": 3}
    with pytest.raises(SaveFailed, match=r"3 checkpoints in a row could not be written, .* Disk quota exceeded"):
        run(toy_config(tmp_path / "run", settings))
    failed = [
        row["step"] for row in record.read(tmp_path / "run" / "record.jsonl") if row.get("event") == "save failed"
    ]
    assert len(failed) == 3


def test_a_checkpoint_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(shards, "write", lambda *arguments: hangs.wait(60))
    settings = {"steps": 50, "checkpoint_every": 2, "save_timeout": 0.5}
    try:
        with pytest.raises(SaveFailed, match=r"was not written within 0\.5 s \(train\.save_timeout\)"):
            run(toy_config(tmp_path / "run", settings))
    finally:
        hangs.set()


def test_read_only_folder(tmp_path: Path) -> None:
    """Fault 16 (the wrong configuration and number of ranks: tests/multiprocess, tests/train)."""
    folder = tmp_path / "locked"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=False).returncode != 0:
        pytest.skip("mounting a read-only file system needs root")
    try:
        with pytest.raises(UserError, match=r"The run folder .* cannot be written to: Read-only file system"):
            run(toy_config(folder / "run", {"steps": 2}))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("moment", [0, 2, 4])
def test_a_signal_during_evaluation(tmp_path: Path, moment: int) -> None:
    """Fault 7: the evaluation is broken off, and comes first after the resume; nothing else differs."""
    settings = {"steps": 30, "ema": 0.9, "patience": 30, "checkpoint_every": 100}
    straight, whole = run(toy_config(tmp_path / "straight", settings))
    config = toy_config(tmp_path / "halves", settings)
    stage = ToyStage(config)
    drawn, evaluations = stage.valid_batches, []

    def valid() -> Iterator[tuple[CellBatch, Tensor]]:
        evaluations.append(1)
        for number, pair in enumerate([*drawn(), None]):
            if len(evaluations) == 2 and number == moment:
                os.kill(os.getpid(), signal.SIGUSR2)
            if pair is not None:
                yield pair

    stage.valid_batches = valid  # type: ignore[method-assign]
    first = Trainer(config, stage).fit()
    assert (first.interrupted, first.step) == (True, 20 if moment < 4 else 21)
    second, halves = run(config, resume=True)
    assert first.losses + second.losses == straight.losses
    assert second.best == straight.best
    pairs = zip(whole.module.state_dict().values(), halves.module.state_dict().values(), strict=True)
    assert all(one.equal(other) for one, other in pairs)
    evaluated = [[row for row in record.read(r.record) if row["kind"] == "valid"] for r in (straight, second)]
    assert [(row["step"], row["nll"]) for row in evaluated[0]] == [(row["step"], row["nll"]) for row in evaluated[1]]


def test_loss_spikes_are_skipped(tmp_path: Path) -> None:
    settings = {"steps": 60, "skip_spikes": 8.0, "micro_batch": 2, "zero": 2, "learning_rate": 1e-3}
    config = toy_config(tmp_path / "run", settings)
    stage = ToyStage(config)
    poison: Any = lambda batch: batch.counts.new_full((len(batch),), 500.0) if batch.step in (10, 40, 41) else None  # noqa: E731
    stage.module.poison = poison
    result = Trainer(config, stage).fit()
    skipped = [row for row in record.read(result.record) if row.get("event") == "skipped"]
    assert [(row["step"], row["reason"]) for row in skipped] == [(41, "spike"), (42, "spike")]
    assert skipped[0]["cells"] == list(range(40_000, 40_008))


class AwayStage(ToyStage):
    """Its store is away for ``seconds`` when step 5 is read."""

    seconds = 0.0
    until: float | None = None

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        for step, found in enumerate(super().train_batches(start_step), start_step):
            if step == 5:
                self.until = self.until or time.monotonic() + self.seconds
                if time.monotonic() < self.until:
                    raise OSError(116, "Stale file handle")
            yield found


def test_a_store_that_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 10, "data_patience": 30}
    straight, _ = run(toy_config(tmp_path / "straight", settings))
    stage = AwayStage(toy_config(tmp_path / "run", settings))
    stage.seconds = 1.0
    result = Trainer(stage.config, stage).fit()
    assert result.losses == straight.losses
    assert capsys.readouterr().err.count("the data cannot be read ([Errno 116] Stale file handle): trying again") == 1
    assert [row["step"] for row in record.read(result.record) if row.get("event") == "data outage"] == [5]


def test_a_signal_while_the_store_is_away(tmp_path: Path) -> None:
    settings = {"steps": 10, "data_patience": 1000, "checkpoint_every": 100}
    straight, _ = run(toy_config(tmp_path / "straight", settings))
    stage = AwayStage(toy_config(tmp_path / "run", settings))
    stage.seconds = 1000.0
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    away = stage.train_batches

    def batches(start: int) -> Iterator[Sequence[CellBatch]]:
        try:
            yield from away(start)
        except OSError:
            if start == 0:
                timer.start()
            raise

    stage.train_batches = batches  # type: ignore[method-assign]
    first = Trainer(stage.config, stage).fit()
    assert (first.interrupted, first.step) == (True, 5)
    second, _ = run(toy_config(tmp_path / "run", settings), resume=True)
    assert first.losses + second.losses == straight.losses


def test_a_store_that_stays_away(tmp_path: Path) -> None:
    stage = AwayStage(toy_config(tmp_path / "run", {"steps": 10, "data_patience": 1, "checkpoint_every": 100}))
    stage.seconds = 1000.0
    with pytest.raises(UserError, match=r"could not be read for 1 s .*Stale file handle\. When the store is back"):
        Trainer(stage.config, stage).fit()
    resumed, _ = run(toy_config(tmp_path / "run", {"steps": 10}), resume=True)
    assert len(resumed.losses) == 5


@pytest.mark.slow  # waits for a time-out that a busy machine's start fits in
def test_a_start_that_hangs_ends_with_the_stacks(tmp_path: Path) -> None:
    """The first batch never comes: after train.start_timeout the run says where it stands, and ends."""
    code = """
import sys, time
from toy import ToyStage, toy_config
from bgen.train.trainer import Trainer

stage = ToyStage(toy_config(sys.argv[1], {"start_timeout": 40, "step_timeout": 1000}))

def never(start):
    time.sleep(1000)
    yield

stage.train_batches = never
Trainer(stage.config, stage).fit()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment(), timeout=200, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: nothing happened for 40 s" in done.stderr
    stacks = (tmp_path / "run" / "stacks" / "rank_0.txt").read_text()
    assert "in never" in stacks
    assert "Timeout" in stacks


def test_a_lock_that_a_killed_build_left(tmp_path: Path) -> None:
    """Fault 15: DeepSpeed would wait for ever at the lock of an op that it builds on CPU hosts."""
    version = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    for name in ("deepspeed_shm_comm", "fused_adam", "cpu_adam"):
        folder = tmp_path / "extensions" / version / name
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    code = (
        f"from toy import run, toy_config; run(toy_config({str(tmp_path / 'run')!r}, "
        "{'steps': 2, 'zero': 2, 'offload': {'optimizer': 'cpu'}}))"
    )
    variables = environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    subprocess.run([python(), "-c", code.replace("'", '"')], env=variables, check=True, timeout=200)
    assert files.committed(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_damaged_store_is_named(tmp_path: Path, bgen: Any, harm: str) -> None:
    """Fault 12: the run ends with the file's name and the store's; nothing is skipped silently."""
    cells, store = tmp_path / "cells.h5ad", tmp_path / "store"
    assert bgen("data", "simulate", "--preset", "tiny", "--out", cells).code == 0
    assert bgen("data", "build", cells, "--out", store).code == 0
    largest = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if harm == "flip":
        for place in range(0, len(content), 97):
            content[place] ^= 255
        largest.write_bytes(content)
    elif harm == "cut":
        largest.write_bytes(content[: len(content) // 2])
    else:
        largest.unlink()
    settings = ["train.steps=20", "train.global_batch=64", "train.data_patience=1", "track.mlflow=false"]
    done = bgen("train", "demo/vae", f"out={tmp_path / 'run'}", f"data.store={store}", *settings)
    assert done.code == 2, done
    assert str(store) in done.err
    assert largest.name in done.err or str(largest.parent.name) in done.err
