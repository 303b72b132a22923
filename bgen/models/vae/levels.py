r"""Levels of the genes: what their logits move by, whatever the state, so that the likelihood is highest.

Training stops while every gene is a little off, each too little to matter by itself; a classifier that looks at all
genes at once finds it. Given everything else, the best levels are the maximum of a concave function of G numbers, and a
few Newton steps over the training cells reach it. With z drawn from the posterior of each cell, the gradient is that of
sum_cells log p(x | z) by the logits, and the curvature (for the zero-inflated form a bound of it) is the information

    I_g = sum_cells mu / (1 + mu / theta),

so that s_g = gradient_g / (I_g + 1) is one step; the 1 lets a gene that was hardly ever counted stay where it is. The
maximum is where each gene's mean of (x - mu) / (1 + mu / theta) over cells is zero, up to a common factor.

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


class LevelStats:
    """Sums over cells, kept as one float64 tensor ``[2, G]`` that ranks can reduce: gradient and information.

    Parameters
    ----------
    n_genes
        G.
    device
        Where the sums live.
    """

    def __init__(self, n_genes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(2, n_genes, dtype=torch.float64, device=device)

    def add(self, batch: CellBatch, likelihood: NegativeBinomial) -> None:
        """Add cells with the distribution that explains them."""
        logits = likelihood.logits.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(replace(likelihood, logits=logits).log_prob_sparse(batch).sum(), logits)
        mu = likelihood.rate
        self.sums[0] += gradient.sum(dim=0, dtype=torch.float64)
        self.sums[1] += (mu / (1 + mu / likelihood.log_theta.exp())).sum(dim=0, dtype=torch.float64)

    def step(self) -> Tensor:
        """Return ``[G]``, float32: what the logits move by."""
        gradient, information = self.sums
        return (gradient / (information + 1)).clamp(-LARGEST_STEP, LARGEST_STEP).float()
