"""Groups, schedules, moving average, state."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from toy import ToyModel

from bgen.config.schema import TrainConfig
from bgen.train.ema import EMA
from bgen.train.schedules import learning_rate
from bgen.train.state import RunState


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
