"""Groups, schedules, moving average, state."""

from __future__ import annotations

import json

import pytest
import torch

from bgen.config.train import TrainConfig
from bgen.train.engine.ema import EMA
from bgen.train.engine.schedules import learning_rate
from bgen.train.state import RunState


def test_learning_rate() -> None:
    cosine = TrainConfig(steps=101, warmup=10, learning_rate=2.0, final_lr=0.1)  # type: ignore[call-arg]
    assert [learning_rate(cosine, step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(cosine, 10) == pytest.approx(2.0)
    assert learning_rate(cosine, 55) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(cosine, 100) == pytest.approx(0.2)
    assert learning_rate(cosine, 200) == pytest.approx(0.2)
    wsd = TrainConfig(steps=100, warmup=10, learning_rate=2.0, schedule="wsd", decay=0.2, final_lr=0.1)  # type: ignore[call-arg]
    assert [learning_rate(wsd, step) for step in (0, 10, 79)] == pytest.approx([0.2, 2.0, 2.0])
    assert learning_rate(wsd, 80) == pytest.approx(2.0 * (1 - 0.9 / 20))
    assert learning_rate(wsd, 99) == pytest.approx(0.2)
    constant = TrainConfig(steps=5, warmup=0, learning_rate=2.0, schedule="constant")  # type: ignore[call-arg]
    assert [learning_rate(constant, step) for step in range(5)] == [2.0] * 5


def test_moving_average() -> None:
    weights = {("a", 0): torch.zeros(3), ("a", 3): torch.ones(2)}
    average = EMA(weights, 0.9)
    moved = {place: weight + 1 for place, weight in weights.items()}
    average.update(moved, step=1000)
    for place, weight in weights.items():
        torch.testing.assert_close(average.pieces[place], weight + 0.1)
    assert weights["a", 0].tolist() == [0.0] * 3
    early = EMA(weights, 0.9)
    early.update(moved, step=0)
    torch.testing.assert_close(early.pieces["a", 3], torch.ones(2) + 0.9)


def test_spikes_are_told_by_the_last_losses() -> None:
    state = RunState("run")
    for step in range(200):
        assert not state.is_spike(100.0, 6.0) or step >= 32
        state.remember(1.0 + 0.1 * (-1) ** step)
    assert len(state.recent) == 128
    state.remember(1e6)
    assert not state.is_spike(1.85, 6.0)
    assert state.is_spike(2.05, 6.0)
    assert not state.is_spike(2.05, 0)
    assert not state.is_spike(float("nan"), 6.0)


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
