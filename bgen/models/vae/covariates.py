"""Covariates of a cell, such as its batch, as a vector that encoder and decoder add.

Axes: B cells, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from bgen.nn.embedding import CategoryEmbedding


class Covariates(nn.Module):
    """Sum of one vector per covariate ``[B, H]``; an unknown code (-1) or an absent column adds nothing."""

    def __init__(self, categories: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.names = list(categories)
        # Not a ModuleDict: a column may be called like one of its methods.
        self.tables = nn.ModuleList(CategoryEmbedding(n, width, zero_unknown=True) for n in categories.values())

    def forward(self, hidden: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """Add the covariates' vectors to ``hidden [B, H]``."""
        for name, table in zip(self.names, self.tables, strict=True):
            if name in obs:
                hidden = hidden + table(obs[name])
        return hidden
