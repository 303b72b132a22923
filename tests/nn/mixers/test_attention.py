"""Attention against its formula; rotary time; pooling and inducing points; state tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bgen.config.backbone import AttentionConfig, TimeConfig
from bgen.nn.mixers.attention import Attention, CellAttention, TimeAttention, attend, attend_plain
from bgen.nn.mixers.set_transformer import AttentionPool, SetAttention
from bgen.nn.mixers.state_tokens import StateTokens
from bgen.nn.points import Points
from bgen.nn.rotary import Rotary

torch.set_num_threads(1)
CONFIG = AttentionConfig(heads=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["all", "masked", "causal", "causal and masked"])
def test_attend_equals_formula(kind: str) -> None:
    q, k, v = (normal(2, 3, 6, 4, seed=s).requires_grad_() for s in range(3))
    allowed = None
    if "masked" in kind:
        allowed = torch.rand(2, 1, 1, 6, generator=torch.Generator().manual_seed(1)) > 0.4
        allowed[1] = False  # an empty population
    if "causal" in kind:
        lower = torch.ones(6, 6, dtype=torch.bool).tril()
        plain_mask = lower if allowed is None else allowed & lower
    else:
        plain_mask = allowed
    found = attend(q, k, v, plain_mask if allowed is not None else None, causal="causal" in kind)
    expected = attend_plain(q, k, v, plain_mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for mine, reference in zip(
        torch.autograd.grad(found.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)
    if "masked" in kind:
        assert found[1].abs().max() == 0


def test_rotary_products_depend_on_differences_of_time() -> None:
    rotary = Rotary(8, 1.0, 100.0).double()
    q, k = normal(1, 2, 1, 8, seed=1), normal(1, 2, 1, 8, seed=2)

    def product(t: float, s: float) -> Tensor:
        return (rotary(q, torch.tensor([[t]])) * rotary(k, torch.tensor([[s]]))).sum(-1)

    torch.testing.assert_close(product(0.25, 3.0), product(100.25, 103.0), rtol=0, atol=1e-10)
    assert (product(0.25, 3.0) - product(3.0, 0.25)).abs().max() > 1e-2
    torch.testing.assert_close(rotary(q, torch.tensor([[17.0]])).norm(), q.norm())
    frequency = rotary.frequency
    assert frequency[0] == pytest.approx(2 * torch.pi)
    assert frequency[-1] == pytest.approx(2 * torch.pi / 100)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_bounds_the_logits(qk_norm: bool) -> None:
    attention = Attention(8, AttentionConfig(heads=2, qk_norm=qk_norm)).double()
    x = 1e4 * normal(1, 5, 8)
    q, k, _ = attention.project(x, x)
    logit = q @ k.mT / 2
    assert (logit.abs().max() < 2.01) == qk_norm  # sqrt(P) = 2


@pytest.mark.parametrize("kind", ["attention", "set_attention"])
def test_cell_mixers_are_equivariant_and_masked(kind: str) -> None:
    torch.manual_seed(0)
    mixer = (CellAttention(8, CONFIG) if kind == "attention" else SetAttention(8, 3, CONFIG)).double()
    x, order = normal(2, 7, 8), torch.randperm(7)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 4:] = False
    y = mixer(x, Points(valid))
    torch.testing.assert_close(mixer(x[:, order], Points(valid[:, order])), y[:, order], rtol=0, atol=1e-12)
    assert torch.equal(mixer(torch.where(valid[..., None], x, torch.nan), Points(valid))[valid], y[valid])
    torch.testing.assert_close(mixer(x[:1, :4], Points()), y[:1, :4], rtol=0, atol=1e-12)
    none = mixer(x, Points(torch.zeros(2, 7, dtype=torch.bool)))
    assert none.isfinite().all()


def test_pool() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(8, 3, CONFIG).double()
    x = normal(2, 7, 8)
    assert pool(x).shape == (2, 3, 8)
    torch.testing.assert_close(pool(x[:, torch.randperm(7)]), pool(x), rtol=0, atol=1e-12)
    valid = torch.tensor([[True] * 7, [False] * 7])
    pooled = pool(x, valid)
    assert pooled[1].abs().max() == 0
    pooled.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pool.parameters())


class PairSlots(nn.Module):
    """A broken time mixer: it lets tokens of a batch see each other's neighbours."""

    def forward(self, x_BTD: Tensor, points: Points) -> Tensor:
        return x_BTD.roll(1, dims=0)


def test_state_tokens_mix_over_time_without_pairing_cells() -> None:
    torch.manual_seed(0)
    tokens = StateTokens(8, 3, TimeAttention(8, CONFIG, TimeConfig()), CONFIG).double()
    x, time = normal(2, 4, 5, 8), torch.arange(4.0).expand(2, 4)
    y = tokens(x, None, Points(None, time))
    order = torch.randperm(5)
    permuted = x.clone()
    permuted[:, 2] = x[:, 2, order]
    z = tokens(permuted, None, Points(None, time))
    torch.testing.assert_close(z[:, 2], y[:, 2, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(z[:, [0, 1, 3]], y[:, [0, 1, 3]], rtol=0, atol=1e-12)
    changed = x.clone()
    changed[0, 2, 1] += 1
    difference = (tokens(changed, None, Points(None, time)) - y).abs().amax((2, 3))
    assert difference[0].min() > 1e-5  # every time point of the trajectory hears of it
    assert difference[1].max() == 0  # no other trajectory does
    broken = StateTokens(8, 3, PairSlots(), CONFIG).double()
    leak = broken(changed, None, Points(None, time)) - broken(x, None, Points(None, time))
    assert leak[1].abs().max() > 0
