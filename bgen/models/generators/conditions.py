"""What generation can be asked for: named columns of categories, numbers or sets of members, embedded as one vector per
cell.

Axes: B cells, C width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgen.config.flow import MemberSizes
from bgen.errors import UserError, nearest
from bgen.models.generators.members import MemberEmbedding, Members
from bgen.nn.embedding import CategoryEmbedding, NumberEmbedding
from bgen.nn.flops import layers
from bgen.nn.gpu.draws import uniform
from bgen.nn.random import Stream

Condition = Tensor | Members
"""Codes int64 or numbers float, or what the labels of a set mean."""


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
    sets
        Column of labels to the sizes of what they mean (:class:`bgen.models.generators.members.MemberEmbedding`).
    """

    def __init__(
        self,
        categories: Mapping[str, int],
        numbers: Mapping[str, tuple[float, float]],
        width: int,
        sets: Mapping[str, MemberSizes] | None = None,
    ) -> None:
        super().__init__()
        self.sizes = dict(categories)
        self.category_names = list(categories)
        self.number_names = list(numbers)
        # Not a ModuleDict: a column may be called like one of its methods.
        self.categories = nn.ModuleList(CategoryEmbedding(n, width, zero_unknown=False) for n in categories.values())
        self.numbers = nn.ModuleList(NumberEmbedding(mean, std, width) for mean, std in numbers.values())
        self.set_names = list(sets or {})
        if sets:  # a module without any has the state that it always had
            self.sets = nn.ModuleList(MemberEmbedding(size, width) for size in sets.values())
        self.joint = nn.Linear(width, width)

    @property
    def told_apart(self) -> list[str]:
        """Columns that can be hidden each by itself; the amounts of a set go with it."""
        return [*self.category_names, *self.number_names, *self.set_names]

    @property
    def names(self) -> list[str]:
        """All columns, those of amounts last."""
        amounts = [part.sizes.amount for part in self.member_embeddings.values() if part.sizes.amount is not None]
        return list(dict.fromkeys([*self.told_apart, *amounts]))

    @property
    def member_embeddings(self) -> dict[str, MemberEmbedding]:
        """Embeddings of sets by column."""
        return (
            dict(zip(self.set_names, cast("Iterable[MemberEmbedding]", self.sets), strict=True))
            if self.set_names
            else {}
        )

    def forward(self, conditions: Mapping[str, Condition], hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """Embed ``conditions`` (column to ``[B]``) to ``[B, C]``; where bool ``hidden [B]``, all are taken as unknown.

        ``hidden`` may also be ``[B, K]``, for each of the columns :attr:`told_apart`.
        Columns that this model does not know are ignored. A set is given as the codes of its labels, with the amounts
        in their own column, or as :class:`Members`. ``keys [B]``: members are forgotten as they say.
        """
        return self.with_acting(conditions, hidden, keys)[0]

    def with_acting(
        self, conditions: Mapping[str, Condition], hidden: Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the same, and the sum over all members alone, ``[B, C]``: zero where nothing acts."""
        device = hidden.device
        each = hidden.expand(len(self.told_apart), -1) if hidden.ndim == 1 else hidden.T
        hidden_of = dict(zip(self.told_apart, each, strict=True))
        acting = torch.zeros(len(hidden), self.joint.in_features, device=device)
        total = torch.zeros(len(hidden), self.joint.in_features, device=device)
        for name, embedding in zip(self.category_names, self.categories, strict=True):
            codes = _plain(conditions.get(name), -1, device)
            total = total + embedding(torch.where(hidden_of[name], -1, codes))
        for name, embedding in zip(self.number_names, self.numbers, strict=True):
            values = _plain(conditions.get(name), torch.nan, device)
            total = total + embedding(torch.where(hidden_of[name], torch.nan, values.float()))
        for name, members in self.member_embeddings.items():
            told, sum_of = members(self._members(name, members, conditions, len(hidden), device), hidden_of[name], keys)
            total, acting = total + told, acting + sum_of
        return self.joint(F.silu(total)), acting

    def _members(
        self, name: str, embedding: MemberEmbedding, conditions: Mapping[str, Condition], n: int, device: torch.device
    ) -> Members:
        given = conditions.get(name)
        if isinstance(given, Members):
            return given
        codes = torch.full((n,), -1, device=device) if given is None else given
        amount = None if embedding.sizes.amount is None else conditions.get(embedding.sizes.amount)
        assert not isinstance(amount, Members), "an amount is a number"
        return embedding.of_labels(codes, amount)

    def flops(self, points: int) -> int:
        """Floating-point operations of the forward pass for so many cells; see :mod:`bgen.nn.flops`."""
        members = sum(part.flops(points) for part in self.member_embeddings.values())
        return layers(points, self.numbers, self.joint) + members

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


def _plain(given: Condition | None, unknown: float, device: torch.device) -> Tensor:
    assert not isinstance(given, Members), "only a set has members"
    return torch.full((), unknown, device=device) if given is None else given


def drop_conditions(keys: Tensor, jointly: float, each: float = 0.0, n: int = 1) -> Tensor:
    """bool ``[B]`` or, where n conditions are hidden each by itself, ``[B, n]``; keyed by ``keys [B]``.

    ``jointly`` is the probability that all conditions of a cell are hidden, ``each`` that of every single one.
    """
    if each == 0 or n == 0:
        return uniform(keys, Stream.CONDITION_DROPOUT, 1).squeeze(1) < jointly
    drawn = uniform(keys, Stream.CONDITION_DROPOUT, 1 + n)
    return (drawn[:, :1] < jointly) | (drawn[:, 1:] < each)
