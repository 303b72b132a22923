"""Chunked SSD against the plain loop, in float64: values and gradients."""

from __future__ import annotations

import numba
import pytest
import torch
from torch import Tensor

from bgen.nn.scans.ssd import ssd_chunked, ssd_sequential
from bgen.nn.scans.ssd_cpu import _shares

torch.set_num_threads(1)

Inputs = dict[str, Tensor]


def inputs(
    T: int, *, H: int = 4, K: int = 1, B: int = 2, P: int = 3, S: int = 5, initial: bool = False, packed: bool = False
) -> Inputs:
    g = torch.Generator().manual_seed(T * 100 + H * 10 + K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = {
        "x_BTHP": normal(B, T, H, P),
        "log_decay_BTH": -torch.rand(B, T, H, generator=g, dtype=torch.float64),
        "b_BTKS": normal(B, T, K, S),
        "c_BTKS": normal(B, T, K, S),
    }
    if initial:
        made["initial_BHPS"] = normal(B, H, P, S)
    if packed:
        made["sequence_BT"] = torch.randint(0, 2, (B, T), generator=g).cumsum(1)
    return made


def values_and_gradients(function: object, made: Inputs, **settings: int | bool) -> list[Tensor]:
    leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in made.items()}
    y, state = function(**leaves, **settings)  # type: ignore[operator]
    # Fixed uneven weights, so that no error cancels in the sum.
    loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + state.square().sum()
    grads = torch.autograd.grad(loss, [v for v in leaves.values() if v.is_floating_point()])
    return [t.detach() for t in (y, state, *grads)]


def worst(made: Inputs, chunk: int) -> float:
    expected = values_and_gradients(ssd_sequential, made)
    found = values_and_gradients(ssd_chunked, made, chunk=chunk, want_state=True)
    return max(float((a - b).abs().max() / (1 + a.abs().max())) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 16, 21, 65])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_loop(T: int, K: int, initial: bool, packed: bool) -> None:
    made = inputs(T, K=K, initial=initial, packed=packed)
    assert worst(made, chunk=8) < 1e-12
    assert worst(made, chunk=64) < 1e-12


@pytest.mark.parametrize("T", [7, 40, 600])
@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_parts_equal_the_loop(T: int, K: int, initial: bool, packed: bool, threads: int) -> None:
    held_to_the_loop(inputs(T, K=K, initial=initial, packed=packed, P=16, S=17), threads)


@pytest.mark.parametrize("H", [4, 5])
def test_the_heads_of_one_group_are_shared_among_threads(H: int) -> None:
    made = inputs(600, H=H, B=1, P=16, S=17, initial=True)
    assert _shares(made["x_BTHP"][:, None], made["b_BTKS"][:, None]) == (1, 1)
    held_to_the_loop(made, threads=2, split=min(2, numba.config.NUMBA_NUM_THREADS))


def held_to_the_loop(made: Inputs, threads: int, split: int | None = None) -> None:
    single = {k: v.float() if v.is_floating_point() else v for k, v in made.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {chunk: values_and_gradients(ssd_chunked, single, chunk=chunk, want_state=True) for chunk in (24, 64)}
        if split is not None:
            assert _shares(made["x_BTHP"][:, None], made["b_BTKS"][:, None])[0] == split
    finally:
        torch.set_num_threads(before)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in single.items()}
    exact = values_and_gradients(ssd_sequential, wide)
    # The gradient of the decay is a difference of sums as large as the gradient of the inputs.
    scale = max(float(a.abs().max()) for a in exact)
    for chunk in found:
        for a, b in zip(exact, found[chunk], strict=True):
            assert b.dtype == torch.float32
            assert (a - b).abs().max() <= 4e-6 * scale


def test_gradcheck() -> None:
    made = inputs(7, H=2, P=2, S=2, B=1, initial=True)
    leaves = tuple(v.requires_grad_() for v in made.values())
    assert torch.autograd.gradcheck(lambda *a: ssd_chunked(*a, chunk=3, want_state=True), leaves)


def test_packed_sequences_equal_separate_ones() -> None:
    made = inputs(20, B=1)
    sequence = torch.tensor([[0] * 3 + [1] * 9 + [2] * 8])
    packed, _ = ssd_chunked(**made, sequence_BT=sequence, chunk=4)
    pieces = [{k: v[:, i:j] for k, v in made.items()} for i, j in ((0, 3), (3, 12), (12, 20))]
    apart = torch.cat([ssd_chunked(**piece, chunk=4)[0] for piece in pieces], dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-13)
    leaking, _ = ssd_chunked(**made, chunk=4)
    assert (leaking - apart).abs().max() > 0.1


def test_a_sequence_number_that_comes_back_is_another_sequence() -> None:
    made = inputs(6, B=1)
    again = torch.tensor([[0, 0, 1, 1, 0, 0]])
    for chunk in (2, 4, 64):
        found = ssd_chunked(**made, sequence_BT=again, chunk=chunk, want_state=True)
        for a, b in zip(found, ssd_sequential(**made, sequence_BT=again), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_padding_by_zero_step_is_exact() -> None:
    made = inputs(11)
    longer = {k: torch.cat([v, torch.zeros_like(v[:, :5])], dim=1) for k, v in made.items()}
    y, state = ssd_chunked(**made, chunk=16, want_state=True)
    y_longer, state_longer = ssd_chunked(**longer, chunk=16, want_state=True)
    torch.testing.assert_close(y_longer[:, :11], y, rtol=0, atol=1e-14)
    torch.testing.assert_close(state_longer, state, rtol=0, atol=1e-14)


def test_sequence_cut_in_two_by_its_state() -> None:
    made = inputs(30)
    whole, last = ssd_chunked(**made, chunk=8, want_state=True)
    head, state = ssd_chunked(**{k: v[:, :13] for k, v in made.items()}, chunk=8, want_state=True)
    tail, end = ssd_chunked(**{k: v[:, 13:] for k, v in made.items()}, initial_BHPS=state, chunk=8, want_state=True)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(end, last, rtol=0, atol=1e-13)


def test_float32_and_bfloat16_inputs() -> None:
    made = inputs(300, K=2)
    exact, _ = ssd_sequential(**made)
    single, _ = ssd_chunked(**{k: v.float() for k, v in made.items()})
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() / exact.abs().max() < 2e-6
    rounded = {k: v.bfloat16() if k != "log_decay_BTH" else v.float() for k, v in made.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = ssd_chunked(**rounded)
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() / exact.abs().max() < 2e-2


def test_short_gaps_after_very_long_ones_keep_their_digits() -> None:
    made = inputs(64)
    long = torch.rand(made["log_decay_BTH"].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    made["log_decay_BTH"] = torch.where(long, -800.0, 0.05 * made["log_decay_BTH"])
    exact, _ = ssd_sequential(**made)
    torch.testing.assert_close(ssd_chunked(**made)[0], exact, rtol=1e-12, atol=1e-12)
    single, _ = ssd_chunked(**{k: v.float() for k, v in made.items()})
    assert (single - exact).abs().max() / exact.abs().max() < 5e-5


def test_the_comparison_sees_a_decay_wrong_by_one_percent() -> None:
    made = inputs(21)
    y, _ = ssd_sequential(**made)
    off, _ = ssd_chunked(**(made | {"log_decay_BTH": made["log_decay_BTH"] * 1.01}), chunk=8)
    assert (y - off).abs().max() > 1e-3
