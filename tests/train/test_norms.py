"""`train.norms`: every layer's gradient and activation, as plain autograd has them, and no change of the training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import ToyModel, ToyStage, cells, run, toy_config

from bgen.distributed import world as ranks
from bgen.track import record
from bgen.train.diagnose.norms import LayerNorms
from bgen.train.trainer import Trainer

LAYERS = ["ToyModel", "embedding", "body.0", "body.1", "body.4"]


def norms(out: Path) -> list[dict[str, Any]]:
    return [row for row in record.read(out / "record.jsonl") if row["kind"] == "norms"]


def by_hand(seed: int) -> dict[str, float]:
    """Gradients and activations of the first step of a toy run."""
    torch.manual_seed(seed)
    model, given = ToyModel(0.0), dict[str, Tensor]()
    for name, part in model.named_modules():
        part.register_forward_hook(lambda _, __, output, name=name: given.setdefault(name, output))
    model(cells(0, 0, 8))["loss"].mean().backward()
    found = {}
    for name, part in model.named_modules():
        gradients = [p.grad.flatten() for p in part.parameters(recurse=False) if p.grad is not None]
        if gradients:
            found[f"gradient/{name or 'ToyModel'}"] = float(torch.cat(gradients).double().norm())
        if gradients and name:
            found[f"activation/{name}"] = float(given[name].detach().double().square().mean().sqrt())
    return found


@pytest.mark.parametrize(("zero", "micro"), [(0, 2), (1, 8), (2, 4), (3, 2)])
def test_a_run_records_what_autograd_has(zero: int, micro: int, tmp_path: Path) -> None:
    settings = {"steps": 5, "eval_every": 0, "zero": zero, "micro_batch": micro, "clip": 1e-3}
    plain, before = run(toy_config(tmp_path / "plain", settings))
    config = toy_config(tmp_path / "run", settings | {"norms": 1})
    result, stage = run(config)
    assert result.losses == plain.losses
    assert norms(tmp_path / "plain") == []
    rows = norms(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    wanted = by_hand(config.seed)
    assert {name.split("/")[1] for name in wanted} == set(LAYERS)
    assert {name: value for name, value in rows[0].items() if "/" in name} == pytest.approx(wanted, rel=1e-5)
    train = [row for row in record.read(result.record) if row["kind"] == "train"]
    for row, other in zip(rows, train, strict=True):
        whole = math.sqrt(sum(value**2 for name, value in row.items() if name.startswith("gradient/")))
        assert other["grad_norm"] == pytest.approx(whole, rel=1e-5)
    hooks = [[len(part._forward_hooks) for part in done.module.modules()] for done in (before, stage)]
    assert hooks[0] == hooks[1]


def test_only_every_so_many_steps_and_the_trackers_take_them(tmp_path: Path) -> None:
    result, _ = run(toy_config(tmp_path / "run", {"steps": 7, "eval_every": 0, "norms": 3}))
    rows = norms(tmp_path / "run")
    assert [row["step"] for row in rows] == [3, 6]
    told = {name: value for name, value, _, step in record.metrics_of(rows[0]) if step == 3}
    assert set(told) == {f"norms/gradient/{name}" for name in LAYERS} | {f"norms/activation/{n}" for n in LAYERS[1:]}
    assert result.step == 7


def test_a_step_that_is_not_finite_shows_where(tmp_path: Path) -> None:
    """The record has null for what is no number."""
    config, on = toy_config(tmp_path / "run", {"steps": 3, "eval_every": 0, "norms": 2}), [False]
    stage = ToyStage(config)
    assert isinstance(stage.module, ToyModel)
    stage.module.body[1].register_forward_hook(lambda _, __, output: output * torch.nan if on[0] else None)
    stage.module.register_forward_pre_hook(lambda _, args: on.__setitem__(0, args[0].step == 1))
    Trainer(config, stage).fit()
    (row,) = norms(tmp_path / "run")
    assert row["activation/body.0"] > 0
    assert row["activation/body.4"] is None
    assert row["gradient/embedding"] is None


class Repeated(nn.Module):
    """Calls a layer twice, keeps one that is frozen and one that gives no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.twice(self.twice(x)))


def test_calls_count_together_and_what_is_frozen_or_not_called_does_not() -> None:
    ranks.start()
    model, x = Repeated(), torch.randn(3, 2)
    first = model.twice(x)
    both = torch.cat([first, model.twice(first)]).detach()
    look = LayerNorms(model, every=2)
    look.begin(1)
    with look.forward():
        model(x)
    look.backward(lambda: iter([("twice.weight", torch.ones(2))]))
    assert look.take() == {}
    look.begin(2)
    with look.forward():
        model(x)
    model(x)  # outside
    look.backward(lambda: iter([("twice.weight", torch.tensor([3.0])), ("twice.bias", torch.tensor([4.0]))]))
    rms = float(both.double().square().mean().sqrt())
    assert look.take() == pytest.approx({"gradient/twice": 5.0, "activation/twice": rms}, rel=1e-6)
    assert look.take() == {}
