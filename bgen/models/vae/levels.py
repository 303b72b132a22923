r"""Levels of the genes: what their logits move by, whatever the state, after training.

Training stops while every gene is a little off, each too little to matter by itself; a classifier that looks at all
genes at once finds it. There are two aims, and Newton steps over training cells reach either. A step moves the logit of
gene g by s_g = gap_g / (slope_g + 1), both sums over cells; the 1 lets a gene that was hardly ever counted stay where
it is.

**Explaining** (:meth:`LevelStats.explain`), for a VAE: the likelihood of the training cells is highest. Given
everything else that is a concave function of G numbers. With z drawn from the posterior of each cell, the gap is the
gradient of sum_cells log p(x | z) by the logits, and the slope (for the zero-inflated form a bound of it) the
information

    I_g = sum_cells mu / (1 + mu / theta).

The maximum is where each gene's mean of (x - mu) / (1 + mu / theta) over cells is zero, up to a common factor.

**Generating** (:meth:`LevelStats.compare`), for a flow's copy of its VAE: cells that the flow generates have each
gene's mean of h(x) = log(1 + 10,000 x / (the cell's counts)) of the training cells. The gap is the difference of the
sums of h over as many cells of both kinds, and the slope what the sum over generated cells gains by the logit. If x is
Poisson of the rate lambda, and h' what h would be with one more count of the gene, that is E[lambda (h' - h)]. So with
r the mean rate given x

    slope_g = sum_cells r (h' - h).

Axes: B cells, G genes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.models.likelihoods.negative_binomial import NegativeBinomial

LARGEST_STEP = 0.5
"""Natural-log units by which a gene moves in one step, at most."""

TARGET_SUM = 10_000.0
"""Counts per cell before the logarithm."""


class LevelStats:
    """Sums over cells, kept as one float64 tensor ``[2, G]`` that ranks can reduce: gap and slope.

    Parameters
    ----------
    n_genes
        G.
    device
        Where the sums live.
    """

    def __init__(self, n_genes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(2, n_genes, dtype=torch.float64, device=device)

    def explain(self, batch: CellBatch, likelihood: NegativeBinomial) -> None:
        """Add cells with the distribution that explains them."""
        logits = likelihood.logits.detach().float().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(replace(likelihood, logits=logits).log_prob_sparse(batch).sum(), logits)
        mu = likelihood.rate
        self.sums[0] += gradient.sum(dim=0, dtype=torch.float64)
        self.sums[1] += (mu / (1 + mu / likelihood.log_theta.exp())).sum(dim=0, dtype=torch.float64)

    @torch.no_grad()
    def compare(self, batch: CellBatch, likelihood: NegativeBinomial, keys: Tensor) -> None:
        """Add measured cells, and as many generated ones: drawn from ``likelihood`` by ``keys [B]``."""
        per_count = TARGET_SUM / batch.library.clamp_min(1)
        measured = torch.log1p(batch.counts * per_count[batch.rows]).double()
        self.sums[0].index_add_(0, batch.indices, measured)
        drawn = likelihood.sample(keys)
        total = drawn.sum(dim=1, keepdim=True)
        generated = torch.log1p(drawn * (TARGET_SUM / total.clamp_min(1)))
        one_more = torch.log1p((drawn + 1) * (TARGET_SUM / (total + 1)))
        gained = likelihood.rate_given(drawn) * (one_more - generated)
        self.sums[0] -= generated.sum(dim=0, dtype=torch.float64)
        self.sums[1] += gained.sum(dim=0, dtype=torch.float64)

    def step(self) -> Tensor:
        """Return ``[G]``, float32: what the logits move by."""
        gap, slope = self.sums
        return (gap / (slope + 1)).clamp(-LARGEST_STEP, LARGEST_STEP).float()
