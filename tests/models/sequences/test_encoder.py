"""The network over positions: what lies beyond an end, order, and both directions; for each mixer."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from bgen.config.sequences import SequenceConfig, SequenceMixer
from bgen.genes.sequences import UNKNOWN
from bgen.models.sequences.encoder import Convolution, SequenceEncoder
from bgen.nn.points import Points

LENGTH = 70
MIXERS = get_args(SequenceMixer)


def encoder(mixer: str, **settings: object) -> SequenceEncoder:
    torch.manual_seed(0)
    given = {"mixer": mixer, "channels": 16, "size": 6, "word": 3, "pool": 4, "blocks": 1, **settings}
    return SequenceEncoder(SequenceConfig.model_validate(given), LENGTH).eval()


def codes(n: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 4, (n, LENGTH)).astype(np.uint8))


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_lies_beyond_the_end_changes_nothing(mixer: str) -> None:
    network, some = encoder(mixer), codes()
    short = some[:, :50]
    padded = torch.nn.functional.pad(short, (0, 20), value=UNKNOWN)
    whole = torch.cat((padded, some))  # beside longer ones
    torch.testing.assert_close(network(whole)[:3], network(short), atol=1e-5, rtol=1e-4)
    assert network(torch.full((2, LENGTH), UNKNOWN, dtype=torch.uint8)).isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_position_counts_from_both_sides(mixer: str) -> None:
    """A block's output at any place depends on bases to its left and to its right."""
    network = encoder(mixer)
    x = torch.randn(1, 12, 16, requires_grad=True)
    network.blocks[0](x, Points())[0, 6].sum().backward()  # type: ignore[operator]
    assert x.grad is not None
    assert (x.grad[0, 4:9].abs().sum(1) > 0).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_order_of_positions_matters(mixer: str) -> None:
    network, some = encoder(mixer), codes()
    assert (network(some) - network(some.flip(1))).abs().max() > 1e-3


def test_the_operations_of_a_convolution_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        Convolution(16)(torch.randn(2, 30, 16), Points())
    assert counter.get_total_flops() == Convolution(16).flops(2, 30)


def test_words_are_those_of_a_loop() -> None:
    network, some = encoder("hyena").words, codes(2)[:, :8]
    some[0, 2] = UNKNOWN
    expected = torch.zeros(2, 2, 16)
    for row in range(2):
        for part in range(2):
            words = [some[row, at : at + 3].tolist() for at in range(4 * part, 4 * part + 4)]
            known = [
                16 * a + 4 * b + c for a, b, c in (word for word in words if len(word) == 3) if UNKNOWN not in (a, b, c)
            ]
            expected[row, part] = network.rows[known].mean(0)
    torch.testing.assert_close(network(some), expected)
