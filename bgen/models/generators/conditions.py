"""What generation can be asked for: named columns of categories or numbers, embedded as one vector per cell.

Axes: B cells, C width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgen.errors import UserError, nearest
from bgen.nn.embedding import CategoryEmbedding, NumberEmbedding
from bgen.nn.flops import layers
from bgen.nn.random import Stream, uniform


class ConditionEmbedding(nn.Module):
    """Joint embedding of the conditions.

    Each column gives a vector; an unknown value (code -1, number NaN, or an absent column) gives that column's learned
    null vector. The sum passes one hidden layer, so that columns can act together.

    Parameters
    ----------
    categories
        Categorical column to its number of categories.
    numbers
        Numeric column to its mean and standard deviation over the training cells, in its unit.
    width
        C.
    """

    def __init__(self, categories: Mapping[str, int], numbers: Mapping[str, tuple[float, float]], width: int) -> None:
        super().__init__()
        self.sizes = dict(categories)
        self.category_names = list(categories)
        self.number_names = list(numbers)
        # Not a ModuleDict: a column may be called like one of its methods.
        self.categories = nn.ModuleList(CategoryEmbedding(n, width, zero_unknown=False) for n in categories.values())
        self.numbers = nn.ModuleList(NumberEmbedding(mean, std, width) for mean, std in numbers.values())
        self.joint = nn.Linear(width, width)

    @property
    def names(self) -> list[str]:
        """All columns."""
        return self.category_names + self.number_names

    def forward(self, conditions: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Embed ``conditions`` (column to ``[B]``) to ``[B, C]``; where bool ``hidden [B]``, all are taken as unknown.

        Columns that this model does not know are ignored.
        """
        device = hidden.device
        total = torch.zeros(len(hidden), self.joint.in_features, device=device)
        for name, embedding in zip(self.category_names, self.categories, strict=True):
            codes = conditions.get(name, torch.full((), -1, device=device))
            total = total + embedding(torch.where(hidden, -1, codes))
        for name, embedding in zip(self.number_names, self.numbers, strict=True):
            values = conditions.get(name, torch.full((), torch.nan, device=device))
            total = total + embedding(torch.where(hidden, torch.nan, values.float()))
        return self.joint(F.silu(total))

    def flops(self, points: int) -> int:
        """Floating-point operations of the forward pass for so many cells; see :mod:`bgen.nn.flops`."""
        return layers(points, self.numbers, self.joint)

    def require_known(self, names: Mapping[str, object]) -> None:
        """Raise UserError for a column that this model was not trained with."""
        for name in names:
            if name not in self.names:
                raise UserError(
                    f"This model was not trained with condition '{name}'.{nearest(name, self.names)}"
                    " Conditions are chosen by flow.conditions when the flow is trained."
                )

    def require_present(self, columns: Mapping[str, object]) -> None:
        """Raise UserError if the training data lacks one of the columns."""
        for name in self.names:
            if name not in columns:
                raise UserError(
                    f"flow.conditions: the data has no column '{name}'.{nearest(name, columns)}"
                    " Remove it from the setting or add the column."
                )


def drop_conditions(keys: Tensor, probability: float) -> Tensor:
    """bool ``[B]``: cells whose conditions are hidden, all of them, with a probability; keyed by ``keys [B]``."""
    return uniform(keys, Stream.CONDITION_DROPOUT, 1).squeeze(1) < probability
