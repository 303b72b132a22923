"""Gaps and step sizes of real time, and the insertion of points that were not observed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgen.errors import UserError
from bgen.nn.points import Points, check_ascending, check_regular, previous_valid
from bgen.nn.real_time import SMALLEST_STEP, both_directions, gaps, split_directions, step_sizes
from bgen.nn.scans.ssd import ssd_chunked

TIMES = torch.tensor([[0.0, 1.0, 4.0, 4.0, 9.0]], dtype=torch.float64)
X = torch.zeros(1, 5, 2, dtype=torch.float64)


def test_gaps_go_back_to_the_last_point_that_exists() -> None:
    assert gaps(Points(time_BL=TIMES), X).tolist() == [[0, 1, 3, 0, 5]]
    holes = Points(valid_BL=torch.tensor([[True, False, True, False, True]]), time_BL=TIMES)
    assert gaps(holes, X).tolist() == [[0, 0, 4, 0, 5]]
    late = Points(valid_BL=torch.tensor([[False, True, True, True, False]]), time_BL=TIMES)
    assert gaps(late, X).tolist() == [[0, 0, 3, 0, 0]]
    assert gaps(Points(), X).tolist() == [[0, 1, 1, 1, 1]]
    assert previous_valid(holes, 5, X.device).tolist() == [[-1, 0, 0, 2, 2]]


def test_gaps_start_again_in_every_packed_sequence() -> None:
    packed = Points(time_BL=torch.tensor([[3.0, 5.0, 0.0, 2.0, 3.0]]), sequence_BL=torch.tensor([[0, 0, 1, 1, 1]]))
    assert gaps(packed, X).tolist() == [[0, 2, 0, 2, 1]]


def test_reverse_recomputes_gaps() -> None:
    points = Points(time_BL=TIMES)
    assert gaps(points.reversed(), X).tolist() == [[0, 5, 0, 3, 1]]
    assert gaps(points.reversed(), X).tolist() != gaps(points, X).flip(1).tolist()
    assert points.reversed().reversed().time_BL.tolist() == TIMES.tolist()  # type: ignore[union-attr]


def test_both_directions_come_back_in_the_order_of_time() -> None:
    x = torch.randn(2, 5, 3)
    stacked, points = both_directions(x, Points(time_BL=TIMES.expand(2, 5)))
    assert points.time_BL is not None
    assert points.time_BL.shape == (4, 5)
    forward, backward = split_directions(stacked)
    assert torch.equal(forward, x)
    assert torch.equal(backward, x)


def test_steps_have_a_floor_and_are_zero_where_nothing_is() -> None:
    points = Points(valid_BL=torch.tensor([[True, True, True, True, False]]), time_BL=TIMES)
    step = step_sizes(torch.full((1, 5, 2), 0.5, dtype=torch.float64), gaps(points, X), points)
    assert step[0, :, 0].tolist() == [SMALLEST_STEP, 0.5, 1.5, SMALLEST_STEP, 0]


def insertion_change(gain: str) -> float:
    """Insert a point without input into a series; return by how much the other outputs change."""
    g = torch.Generator().manual_seed(0)
    time = torch.tensor([[0.0, 0.7, 1.9, 5.0, 5.3]], dtype=torch.float64)
    longer = torch.tensor([[0.0, 0.7, 1.9, 3.1, 5.0, 5.3]], dtype=torch.float64)
    x, b, c = (torch.randn(1, 5, *s, generator=g, dtype=torch.float64) for s in ((2, 3), (1, 4), (1, 4)))
    keep = torch.tensor([0, 1, 2, 4, 5])

    def run(time_BL: Tensor, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        points = Points(time_BL=time_BL)
        dt = step_sizes(torch.full((1, 1, 2), 0.8, dtype=torch.float64), gaps(points, x), points)
        if gain == "index":
            dt = torch.full_like(dt, 0.8)
        scale = {"impulse": torch.ones_like(dt), "index": torch.ones_like(dt), "held": dt}[gain]
        return ssd_chunked(x * scale[..., None], -dt, b, c)[0]

    def spread(t: Tensor) -> Tensor:
        return t.new_zeros(1, 6, *t.shape[2:]).index_copy(1, keep, t)

    return float((run(longer, spread(x), spread(b), spread(c))[:, keep] - run(time, x, b, c)).abs().max())


def test_a_point_without_input_may_be_inserted() -> None:
    assert insertion_change("impulse") < 1e-12
    # What the property forbids is seen by this test: inputs scaled by the gap, and steps that count places.
    assert insertion_change("held") > 1e-2
    assert insertion_change("index") > 1e-2


def test_impulse_through_a_kernel_that_multiplies_by_the_step() -> None:
    """x / dt keeps the gradient of the rate at the floor to 1e-3 in float32; far below the floor it would be lost."""

    def gradient(gap: float, dtype: torch.dtype, divided: bool) -> float:
        g = torch.Generator().manual_seed(1)
        x = torch.randn(1, 32, 1, 4, generator=g, dtype=torch.float64).to(dtype)
        b, c = (torch.randn(1, 32, 1, 4, generator=g, dtype=torch.float64).to(dtype) for _ in "bc")
        rate = torch.ones((), dtype=dtype, requires_grad=True)
        dt = (rate * gap).expand(1, 32, 1)
        inputs = (x / dt[..., None]) * dt[..., None] if divided else x
        y, _ = ssd_chunked(inputs, -dt, b, c)
        return float(torch.autograd.grad(y.sum(), rate)[0])

    def error(gap: float) -> float:
        exact = gradient(gap, torch.float64, False)
        return abs(gradient(gap, torch.float32, True) - exact) / abs(exact)

    assert error(0.1) < 1e-4
    assert error(SMALLEST_STEP) < 2e-3
    assert error(1e-7) > 10 * error(SMALLEST_STEP)


def test_regular_grids() -> None:
    check_regular(Points(time_BL=torch.tensor([[5.0, 6.0, 7.0]])), "hyena")
    check_regular(Points(), "hyena")
    holes = Points(valid_BL=torch.tensor([[True, False, True]]), time_BL=torch.tensor([[5.0, 99.0, 7.0]]))
    check_regular(holes, "hyena")
    with pytest.raises(UserError, match=r"hyena needs time points one unit of time apart.*1 to 4 in 1 step"):
        check_regular(Points(time_BL=TIMES), "hyena")
    with pytest.raises(UserError, match="time_scale"):
        check_regular(Points(time_BL=torch.tensor([[0.0, 2.0, 4.0]])), "hyena")
    with pytest.raises(UserError, match="packed"):
        check_regular(Points(sequence_BL=torch.tensor([[0, 1]])), "hyena")


def test_time_must_ascend() -> None:
    check_ascending(Points(time_BL=TIMES))
    check_ascending(Points(valid_BL=torch.tensor([[True, False, True]]), time_BL=torch.tensor([[0.0, -5.0, 1.0]])))
    check_ascending(Points(time_BL=torch.tensor([[4.0, 5.0, 0.0]]), sequence_BL=torch.tensor([[0, 0, 1]])))
    with pytest.raises(UserError, match="trajectory 1 of the batch: time goes from 3 to 2"):
        check_ascending(Points(time_BL=torch.tensor([[0.0, 1.0, 2.0], [1.0, 3.0, 2.0]])))
    with pytest.raises(UserError, match="nan"):
        check_ascending(Points(time_BL=torch.tensor([[0.0, torch.nan]])))
