"""Exponential moving average of the trained parameters, in float32, each rank its share.

Buffers are not averaged: the module's own are used with the averaged parameters.
"""

from __future__ import annotations

import torch

from bgen.checkpoint.shards import AVERAGE, Shards
from bgen.train.engine.engine import Pieces


class EMA:
    r"""Average :math:`\bar w \leftarrow d\,\bar w + (1 - d)\,w` after every optimiser step.

    Early on the decay is :math:`\min(d, (1 + s) / (10 + s))`, so that the average forgets the initial weights.

    Parameters
    ----------
    weights
        The float32 weights that this rank keeps.
    decay
        d.
    """

    def __init__(self, weights: Pieces, decay: float) -> None:
        self.decay = decay
        self.pieces = {place: weight.clone() for place, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Pieces, step: int) -> None:
        """Take in the weights after the 0-based ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.pieces.values()), [weights[place] for place in self.pieces], 1.0 - decay)

    def load(self, saved: Shards) -> None:
        """Restore the averages of a checkpoint; if it has none, the average starts from the weights."""
        if AVERAGE in saved.kinds:
            for (name, start), average in self.pieces.items():
                average.copy_(saved.read(AVERAGE, name, start, len(average)))
