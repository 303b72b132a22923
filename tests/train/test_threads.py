"""No more threads than a step pays for, unless the user said how many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy import ToyStage, toy_config

from bgen.cpus import MARK
from bgen.data.batch import CellBatch
from bgen.distributed.world import World
from bgen.train.threads import WORTH, as_many_threads_as_pay, paid_for
from bgen.train.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", MARK):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("parameters", "cells", "expected"),
    [(1, 1, 1), (WORTH, 1, 1), (WORTH, 2, 2), (WORTH // 100, 399, 3), (WORTH, 9, 4)],
)
def test_paid_for(parameters: int, cells: int, expected: int) -> None:
    assert paid_for(parameters, cells, most=4) == expected


def threads(world: World, cells: int = 8) -> int:
    """Return the number of threads within; checks that afterwards all is as before, also after an error."""
    module = nn.Linear(1000, 1000, bias=False)
    module.register_parameter("frozen", nn.Parameter(torch.zeros(10**6), requires_grad=False))
    found = 0
    with pytest.raises(KeyError), as_many_threads_as_pay(module, cells, world):  # noqa: PT012 - the error is within
        found = torch.get_num_threads()
        raise KeyError
    assert torch.get_num_threads() == 4
    return found


def test_a_step_takes_what_it_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads(World(0, 1, 0, 1, CPU), cells=8) == 1
    assert threads(World(0, 1, 0, 1, CPU), cells=2 * WORTH // 10**6) == 2
    assert threads(World(0, 1, 0, 1, GPU)) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads(World(0, 1, 0, 1, CPU)) == 4


def test_what_torchrun_sets_unasked_is_not_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads(World(0, 2, 0, 2, CPU)) == 1
    assert threads(World(0, 1, 0, 1, CPU)) == 4


def test_the_trainers_steps_and_evaluations(tmp_path: Path) -> None:
    stage = ToyStage(toy_config(tmp_path / "run", {"steps": 4, "eval_every": 2}))
    seen = set()
    forward = stage.module.forward

    def look(batch: CellBatch) -> dict[str, Tensor]:
        seen.add(torch.get_num_threads())
        found: dict[str, Tensor] = forward(batch)
        return found

    stage.module.forward = look  # type: ignore[method-assign]
    Trainer(stage.config, stage).fit()
    assert seen == {1}
    assert torch.get_num_threads() == 4
