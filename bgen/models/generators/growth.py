"""How fast cells grow, by their state: learned from the plans of training, asked for by forecasts.

With growth rates g and the time since a population was observed, its cells are the start of later ones with weights
w_i ~ exp(g_i gap). Training sees which observed cells the plan (:mod:`bgen.flow.plans`) makes the starts of later ones,
and maximises their likelihood among all of the population,

    loss = log mean over cells i of exp(g_i gap)  -  mean over starts k of g_k gap

whose least is where exp(g gap) is their density relative to the population's.

Axes: B trajectories, T time points, N cells per time point, D latent size, C width of the condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bgen.flow.start import BESIDE, Starts, neighbours

HIDDEN = 64


class GrowthRate(nn.Module):
    """Growth rates of cells, relative to one another; all alike before training.

    Parameters
    ----------
    size
        D.
    width
        C.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(size, HIDDEN)
        self.condition = nn.Linear(width, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return rates ``[...]`` per unit of the flow's time (``backbone.time.scale``).

        ``z [..., D]`` are whitened latents, ``condition [..., C]`` embedded conditions of their population.
        """
        rates: Tensor = self.head(functional.silu(self.state(z) + self.condition(condition)))
        return rates.squeeze(-1).float()

    def flops(self, B: int, T: int, N: int) -> int:
        """Floating-point operations of :meth:`loss`, forward: rates of the cells and of the starts."""
        of_cells = self.state.in_features * HIDDEN + HIDDEN
        return 4 * B * T * (N * of_cells + self.condition.in_features * HIDDEN)

    def loss(
        self, z: Tensor, z1: Tensor, condition: Tensor, mask: Tensor, time: Tensor, observed: Tensor, starts: Starts
    ) -> Tensor:
        """Return the loss ``[B]``, the mean over time points that start beside an observed one; 0 without any.

        ``z, z1 [B, T, N, D]`` are data and their starts; ``condition [B, T, C]``, ``mask [B, T, N]``, ``time, observed
        [B, T]``; times are in units of the flow's scale.
        """
        exists = mask.any(-1)
        before, after = neighbours(exists, observed)
        source = torch.where(before >= 0, before, after).clamp_min(0)
        counts = exists & ~observed & (starts.kind == BESIDE)
        gap = (time - time.gather(1, source))[..., None]
        of_cells = source[..., None].expand(mask.shape)
        of_source = condition.gather(1, source[..., None].expand_as(condition))
        there = mask.gather(1, of_cells)
        grown = gap * self(z, condition[:, :, None]).gather(1, of_cells)
        level = grown.masked_fill(~there, -1e9).logsumexp(-1) - there.sum(-1).clamp_min(1).log()
        likelihood = (gap * self(z1, of_source[:, :, None]) * mask).sum(-1) / mask.sum(-1).clamp_min(1)
        return ((level - likelihood) * counts).sum(1) / counts.sum(1).clamp_min(1)
