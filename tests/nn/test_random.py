from __future__ import annotations

import pytest
import torch
from scipy import stats

from bgen.nn.random import keep_mask, normal, random_bits, uniform, uniform64

KEYS = torch.arange(4000) * 977 - 13


def splitmix64(state: int, position: int) -> int:
    """SplitMix64 in Python's integers, as published."""
    mask = (1 << 64) - 1
    z = (state + (position + 1) * 0x9E3779B97F4A7C15) & mask
    return finalise(z)


def finalise(z: int) -> int:
    mask = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_bits_are_those_of_splitmix64_in_exact_integers() -> None:
    mask = (1 << 64) - 1
    keys = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])
    for stream in (0, 3, 65540):
        bits = random_bits(keys, stream, 4)
        for i, key in enumerate(keys.tolist()):
            state = finalise((finalise(key & mask) + stream * 0xD1342543DE82EF95) & mask)
            assert [b & mask for b in bits[i].tolist()] == [splitmix64(state, j) for j in range(4)]


@pytest.mark.parametrize("draw", [uniform, normal, uniform64])
def test_a_row_depends_on_its_key_alone_and_not_on_the_length(draw) -> None:
    whole = draw(KEYS, 5, 9)
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(KEYS[order], 5, 9), whole[order])
    assert torch.equal(draw(KEYS[:7], 5, 4), whole[:7, :4])
    assert not torch.equal(draw(KEYS, 6, 9), whole)


def test_uniform_is_uniform_open_and_independent() -> None:
    u = uniform(KEYS, 1, 51)
    assert u.dtype == torch.float32
    assert u.shape == (4000, 51)
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    correlation = torch.corrcoef(torch.cat((u, uniform(KEYS, 2, 51)), dim=1).T) - torch.eye(102)
    assert correlation.abs().max() < 5 / 4000**0.5
    along_keys = torch.corrcoef(torch.stack((u[:-1].flatten(), u[1:].flatten())))[0, 1]
    assert abs(along_keys) < 5 / u.numel() ** 0.5


def test_normal_is_normal() -> None:
    x = normal(KEYS, 1, 51)
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    assert x.isfinite().all()
    assert (torch.corrcoef(x.T) - torch.eye(51)).abs().max() < 5 / 4000**0.5


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999999])
def test_keep_mask_keeps_the_right_share_in_every_column(keep: float) -> None:
    mask = keep_mask(KEYS, 70000, 13, keep)
    assert mask.shape == (4000, 13)
    assert (mask.float().mean(dim=0) - keep).abs().max() < 5 * (keep * (1 - keep) / 4000) ** 0.5 + 1e-3
