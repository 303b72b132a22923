"""When memory runs out, the message names the setting to change, with the sizes at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import ToyStage, cells, toy_config

from bgen.config.load import validate
from bgen.config.run import Config
from bgen.distributed.world import World
from bgen.errors import UserError, memory_ran_out
from bgen.train.diagnose import out_of_memory as module
from bgen.train.diagnose.out_of_memory import MemoryWatch, advice, smaller_micro_batch
from bgen.train.trainer import Trainer

EXABYTE = 1 << 60
GPU = World(3, 4, 3, 4, torch.device("cuda", 3))


def fails_at(step: int, what: Callable[[], object], config: Config) -> Trainer:
    stage = ToyStage(config)
    stage.module.register_forward_pre_hook(lambda _, args: what() if args[0].step == step - 1 else None)
    return Trainer(config, stage)


@pytest.mark.parametrize(
    "take",
    [lambda: torch.empty(EXABYTE, dtype=torch.uint8), lambda: np.empty(EXABYTE, np.uint8)],
    ids=["torch", "numpy"],
)
def test_the_message_says_where_and_what_to_change(take: Callable[[], object], tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", {"steps": 4, "eval_every": 0, "micro_batch": 4})
    with pytest.raises(UserError) as raised:
        fails_at(3, take, config).fit()
    said = str(raised.value)
    assert said.startswith("Rank 0 ran out of memory at step 3, with 4 cells at a time (")
    assert "train.micro_batch=2 (cells at a time, now 4)" in said
    assert "vae.recompute=true (now false)" in said
    assert "vae.hidden (now 256)" in said
    assert "data.prefetch and data.window (now 4 and 16)" in said
    assert "1152921504606846976 bytes" in said or "1.00 EiB" in said
    parameters = sum(p.numel() for p in ToyStage(config).module.parameters())
    assert f"a network of {parameters:,} parameters" in said
    assert not (tmp_path / "run" / "memory").exists()


def test_another_error_is_left_as_it_is(tmp_path: Path) -> None:
    def other() -> None:
        raise RuntimeError("another one")

    with pytest.raises(RuntimeError, match="another one"):
        fails_at(2, other, toy_config(tmp_path / "run", {"steps": 3, "eval_every": 0})).fit()


@pytest.mark.parametrize(
    ("share", "now", "unit", "smaller"),
    [
        (64, 64, 1, 32),
        (64, 8, 1, 4),
        (12, 12, 1, 6),
        (12, 4, 1, 2),
        (7, 7, 1, 1),
        (8, 1, 1, None),
        (96, 96, 32, 32),
        (96, 32, 32, None),
    ],
)
def test_the_next_micro_batch_divides_the_ranks_share(share: int, now: int, unit: int, smaller: int | None) -> None:
    assert smaller_micro_batch(share, now, unit) == smaller


def test_advice_names_no_setting_that_would_not_help() -> None:
    tree: dict[str, Any] = {
        "stage": "flow",
        "out": "run",
        "data": {"store": "store", "trajectories": {"times": 4, "cells": 8}},
        "train": {"global_batch": 128, "micro_batch": 32, "precision": "bf16", "zero": 3},
        "flow": {"vae": "vae", "backbone": {"recompute": True, "width": 64}},
    }
    found = advice(validate(tree, Config, "here"), 32, GPU)
    assert found == [
        "data.trajectories.times and cells (now 4 x 8): one trajectory is put through at a time already",
        "flow.backbone.width and layers (now 64 and 4): a smaller network",
        "train.offload.optimizer=cpu (now none): slower",
    ]
    tree["train"] |= {"precision": "float32", "zero": 1, "micro_batch": 0 or None, "offload": {"optimizer": "cpu"}}
    tree["flow"]["backbone"]["recompute"] = False
    tree["train"]["global_batch"] = 256
    found = advice(validate(tree, Config, "here"), 64, GPU)
    assert [line.split()[0] for line in found] == [
        "train.micro_batch=32",
        "train.precision=bf16",
        "flow.backbone.recompute=true",
        "flow.backbone.width",
        "train.zero=2",
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Answers of a GPU, and what was asked of it to remember."""
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5e8, 141e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 130e9)
    monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **how: asked.append(how.get("enabled", "all"))
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"memory"))
    return asked


def test_a_gpu_leaves_a_picture_of_its_memory(gpu: list[object], tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run")
    watch = MemoryWatch(config, torch.nn.Linear(2, 2), GPU)
    watch.computing(7, cells(0, 0, 2))
    with pytest.raises(UserError, match="Rank 3 ran out of memory at step 7, with 2 cells at a time") as raised, watch:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand so on")
    said = str(raised.value)
    assert "NVIDIA H200 (141 GB, 0.5 GB free, 130 GB in tensors)" in said
    assert "CUDA out of memory. Tried to allocate 2.00 GiB.\n" in said
    assert "and so on" not in said
    assert str(tmp_path / "run" / "memory" / "rank_3.pickle") in said
    assert (tmp_path / "run" / "memory" / "rank_3.pickle").read_bytes() == b"memory"
    (tmp_path / "full").write_text("a file where the run folder would be")
    watch = MemoryWatch(toy_config(tmp_path / "full"), torch.nn.Linear(2, 2), GPU)
    with pytest.raises(UserError, match="while training was set up") as raised, watch:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "pickle" not in str(raised.value)


def test_allocations_are_remembered_in_the_first_steps_only(gpu: list[object], tmp_path: Path) -> None:
    with MemoryWatch(toy_config(tmp_path), torch.nn.Linear(2, 2), GPU) as watch:
        for _ in range(module.HISTORY_STEPS - 1):
            watch.done()
        assert gpu == ["all"]
        for _ in range(3):
            watch.done()
        assert gpu == ["all", None]
    assert gpu == ["all", None]
    with MemoryWatch(toy_config(tmp_path), torch.nn.Linear(2, 2), GPU):
        pass
    assert gpu == ["all", None] * 2


def test_errors_that_say_that_no_memory_was_left() -> None:
    assert memory_ran_out(MemoryError())
    assert memory_ran_out(torch.OutOfMemoryError())
    assert memory_ran_out(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not memory_ran_out(RuntimeError("shape mismatch"))
    assert not memory_ran_out(ValueError("CUDA out of memory"))
