from __future__ import annotations

import torch

from bgen.nn.modulation import AdaLNZero


def test_starts_as_plain_normalisation_with_a_closed_gate() -> None:
    layer = AdaLNZero(8, 5)
    x = torch.randn(2, 3, 4, 8)
    y, gate = layer(x, torch.randn(2, 3, 5))
    assert torch.equal(gate, torch.zeros(2, 3, 1, 8))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))


def test_is_the_formula_with_one_condition_per_time_point() -> None:
    torch.manual_seed(0)
    layer = AdaLNZero(8, 5)
    torch.nn.init.normal_(layer.project.weight)
    x, c = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5)
    y, gate = layer(x, c)
    shift, scale, expected_gate = layer.project(torch.nn.functional.silu(c[1, 2])).chunk(3)
    expected = (x[1, 2] - x[1, 2].mean(-1, keepdim=True)) / (
        x[1, 2].var(-1, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    torch.testing.assert_close(y[1, 2], expected * (1 + scale) + shift)
    torch.testing.assert_close(gate[1, 2, 0], expected_gate)


def test_other_time_points_do_not_feel_a_condition() -> None:
    layer = AdaLNZero(8, 5)
    torch.nn.init.normal_(layer.project.weight)
    x, c = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5)
    changed = c.clone()
    changed[0, 1] += 1
    same = (layer(x, c)[0] == layer(x, changed)[0]).all(dim=(2, 3))
    assert same.tolist() == [[True, False, True], [True, True, True]]


def test_conditions_broadcast_over_the_axes_they_lack() -> None:
    layer = AdaLNZero(8, 5)
    for x, c, gate_shape in [
        ((2, 8), (2, 5), (2, 8)),
        ((2, 3, 8), (2, 3, 5), (2, 3, 8)),
        ((2, 3, 8), (2, 5), (2, 1, 8)),
    ]:
        y, gate = layer(torch.randn(x), torch.randn(c))
        assert y.shape == x
        assert gate.shape == gate_shape
