"""`train.micro_batch: auto`: the largest that fits is found, and the run is the one with that number."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from toy import ToyStage, toy_config

from bgen.config.run import Config
from bgen.errors import UserError
from bgen.track import record
from bgen.train import auto_micro_batch as auto
from bgen.train.auto_micro_batch import FILL, candidates, chosen_before, find_micro_batch
from bgen.train.trainer import Trainer, TrainResult

EXABYTE = 1 << 60


def limited(stage: ToyStage, most: int) -> list[int]:
    """Let the CPU's allocator refuse batches of more cells; returns the sizes that come, in order."""
    sizes: list[int] = []

    def takes_memory(module: nn.Module, args: Any) -> None:
        if not module.training:
            return
        sizes.append(len(args[0]))
        if len(args[0]) > most:
            torch.empty(EXABYTE, dtype=torch.uint8)

    stage.module.register_forward_pre_hook(takes_memory)
    return sizes


def train(config: Config, most: int, resume: bool = False) -> tuple[TrainResult, ToyStage, list[int]]:
    stage = ToyStage(config, dropout=0.3)
    sizes = limited(stage, most)
    return Trainer(config, stage).fit(resume), stage, sizes


def told(out: Path) -> list[dict[str, Any]]:
    """Rows of figures without what differs from run to run."""
    varying = {"time", "cells_per_s", "data_wait", "memory_gb", "nonzeros_per_s"}
    rows = [row for row in record.read(out / "record.jsonl") if row["kind"] in ("train", "valid", "norms")]
    return [{name: value for name, value in row.items() if name not in varying} for row in rows]


def test_halves_of_a_share_as_far_as_trajectories_stay_whole() -> None:
    assert list(candidates(96, 1)) == [96, 48, 24, 12, 6, 3]
    assert list(candidates(96, 24)) == [96, 48, 24]
    assert list(candidates(7, 1)) == [7]


def test_the_record_says_what_was_chosen() -> None:
    rows: list[dict[str, Any]] = [
        {"event": "start"},
        {"event": "micro batch", "chosen": 16},
        {"event": "micro batch", "chosen": 8},
    ]
    assert chosen_before(rows[:1], 64, 1) is None
    assert chosen_before(rows, 64, 1) == 8
    assert chosen_before(rows, 24, 1) == 6  # other ranks, another share
    assert chosen_before(rows, 4, 1) == 4


@pytest.mark.parametrize("zero", [0, 1])
def test_the_run_is_the_one_with_the_number_that_fits(zero: int, tmp_path: Path) -> None:
    settings = {"steps": 6, "eval_every": 3, "checkpoint_every": 3, "ema": 0.9, "zero": zero, "norms": 3}
    plain, given, _ = train(toy_config(tmp_path / "given", settings | {"micro_batch": 2}), 8)
    result, stage, sizes = train(toy_config(tmp_path / "auto", settings | {"micro_batch": "auto"}), 2)
    assert sizes[:3] == [8, 4, 2]  # the trials
    assert sizes[3:7] == [2] * 4  # the first step
    assert result.losses == plain.losses
    for name, value in given.module.state_dict().items():
        torch.testing.assert_close(stage.module.state_dict()[name], value, rtol=0, atol=0)
    assert told(tmp_path / "auto") == told(tmp_path / "given")
    (row,) = [row for row in record.read(result.record) if row.get("event") == "micro batch"]
    assert (row["step"], row["chosen"]) == (0, 2)
    assert [(trial["cells"], trial["fits"]) for trial in row["tried"]] == [(8, False), (4, False), (2, True)]
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["train"]["micro_batch"] == 2


def test_a_resumed_run_keeps_its_size(tmp_path: Path) -> None:
    settings = {"eval_every": 0, "checkpoint_every": 2, "micro_batch": "auto"}
    whole, _, _ = train(toy_config(tmp_path / "whole", settings | {"steps": 6}), 4)
    first, _, _ = train(toy_config(tmp_path / "run", settings | {"steps": 4}), 4)
    # There is room for all now, and nothing is tried.
    second, _, sizes = train(toy_config(tmp_path / "run", settings | {"steps": 6}), 8, resume=True)
    assert sizes == [4] * 4
    assert first.losses + second.losses == whole.losses
    assert len([row for row in record.read(second.record) if row.get("event") == "micro batch"]) == 1


def test_what_is_measured_and_what_a_run_keeps_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is given; the CPU's allocator refuses nothing."""
    config = toy_config(tmp_path / "run", {"micro_batch": "auto", "global_batch": 64})
    monkeypatch.setattr(auto, "memory_limit", lambda world: 0)
    with pytest.raises(UserError, match="not even 1 cells at a time fit") as raised:
        find_micro_batch(ToyStage(config), config, ToyStage(config).world)
    assert "train.micro_batch=auto" in str(raised.value)
    needed: dict[int, int] = {}
    for limit in (1e12, 1e5, 4e4, 2e4):
        monkeypatch.setattr(auto, "memory_limit", lambda world, limit=limit: limit)
        stage = ToyStage(config)
        trials = find_micro_batch(stage, config, stage.world)
        assert [trial.fits for trial in trials] == [False] * (len(trials) - 1) + [True]
        for trial in trials:
            assert trial.needed is not None
            assert trial.fits == (trial.needed <= FILL * limit)
            needed.setdefault(trial.cells, trial.needed)
            assert needed[trial.cells] == trial.needed  # the same every time
        assert stage.config.train.micro_batch == trials[-1].cells
    assert len(needed) > 1
    assert all(more > less for more, less in itertools.pairwise(needed.values()))


def test_a_trial_leaves_everything_as_it_was(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"micro_batch": "auto"})
    stage = ToyStage(config, dropout=0.5)
    before = copy.deepcopy(stage.module.state_dict())
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    state = str(np.random.get_state())  # noqa: NPY002
    find_micro_batch(stage, config, stage.world)
    assert torch.equal(torch.rand(3), wanted)
    assert str(np.random.get_state()) == state  # noqa: NPY002
    for name, value in stage.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in stage.module.parameters())
    assert not (tmp_path / "run").exists()


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"micro_batch": "auto"})
    stage = ToyStage(config)

    def fails(*_: Any) -> None:
        raise RuntimeError("another one")

    stage.module.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="another one"):
        Trainer(config, stage).fit()


class OneSize:
    """A stage whose batches have one size."""


def test_a_stage_that_cannot_split_its_batches_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"micro_batch": "auto"})
    stage: Any = OneSize()
    with pytest.raises(UserError, match="give a number"):
        find_micro_batch(stage, config, ToyStage(config).world)
