"""Groups, schedules, moving average, state."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from toy import ToyModel

from bgen.config.schema import TrainConfig
from bgen.train.ema import EMA
from bgen.train.groups import parameter_groups, undecayed
from bgen.train.schedules import learning_rate
from bgen.train.state import RunState


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.D = nn.Parameter(torch.zeros(4, 2))
        self.dt_bias = nn.Parameter(torch.zeros(4, 2))
        self.weight = nn.Parameter(torch.zeros(4, 2))
        self.null_embedding = nn.Parameter(torch.zeros(1, 4))
        self.dispersion = nn.Parameter(torch.zeros(7))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.Embedding(3, 4), nn.Conv1d(4, 4, 2)
        )


def test_what_does_not_decay() -> None:
    module = Mixer()
    without = {"A_log", "D", "dt_bias", "null_embedding", "dispersion"}
    without |= {
        "layers.0.bias",
        "layers.1.weight",
        "layers.1.bias",
        "layers.2.weight",
        "layers.3.weight",
        "layers.4.bias",
    }
    assert undecayed(module) == without
    decayed, rest = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    expected = [module.weight, module.layers[0].weight, module.layers[4].weight]
    assert [id(parameter) for parameter in decayed["params"]] == [id(parameter) for parameter in expected]
    assert len(rest["params"]) == len(without)


def test_a_module_without_one_of_the_groups() -> None:
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3), 0.1)] == [0.0]


def test_learning_rate() -> None:
    cosine = TrainConfig(steps=101, warmup=10, learning_rate=2.0, final_lr=0.1)  # type: ignore[call-arg]
    assert [learning_rate(cosine, step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(cosine, 10) == pytest.approx(2.0)
    assert learning_rate(cosine, 55) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(cosine, 100) == pytest.approx(0.2)
    assert learning_rate(cosine, 200) == pytest.approx(0.2)
    constant = TrainConfig(steps=5, warmup=0, learning_rate=2.0, schedule="constant")  # type: ignore[call-arg]
    assert [learning_rate(constant, step) for step in range(5)] == [2.0] * 5


def test_moving_average() -> None:
    module = ToyModel(0.0)
    before = copy.deepcopy(module)
    average = EMA(module, 0.9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    average.update(module, step=1000)
    now = copy.deepcopy(module)
    with average.swapped_in(module):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter, before.get_parameter(name) + 0.1)
    assert all(torch.equal(p, now.get_parameter(name)) for name, p in module.named_parameters())
    early = EMA(before, 0.9)
    early.update(module, step=0)
    torch.testing.assert_close(early.weights["A_log"], before.A_log.detach() + 0.9)


def test_state_survives_json_exactly() -> None:
    state = RunState("run")
    for value in (0.1, 1 / 3, 1e-300):
        state.add({"loss": value})
    state.evaluated(0.1 + 0.2, patience=2)
    again = RunState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    assert again.take_means() == state.take_means()
    assert again.take_means() == {}
    again.add({"loss": 3.0})
    assert again.take_means() == {"loss": 3.0}


def test_patience() -> None:
    state = RunState("run")
    losses = [3.0, 2.0, 2.5, float("nan"), 1.0, 1.0, 1.0, 1.0]
    found = [(state.evaluated(loss, patience=3), state.stopped_early) for loss in losses]
    assert [better for better, _ in found] == [True, True, False, False, True, False, False, False]
    assert [stopped for _, stopped in found] == [False] * 7 + [True]
