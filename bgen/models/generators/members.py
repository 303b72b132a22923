"""A condition with content: a set of members (perturbations, drugs, cytokines), each with its amount.

    e(set) = sum over members  r_m(amount) (own_m + W vector_m),    r_m(d) = d^h_m / (d^h_m + c_m^h_m)

``own_m`` is learnt for each member of training, and ``W`` maps what is known of a member by its name, such as how its
target gene varies with others. In training, own rows are dropped now and then, so that ``W`` learns to do without them:
a member that was never seen has an embedding, too. An amount acts through a Hill function with a threshold and a slope
for each member; without amount, r = 1. So sets, members and amounts that training did not hold have a meaning.

Axes: ``...`` any leading axes, K members of a set, P members of training, L labels of training, V names with a vector,
E size of a vector, C width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from bgen.config.flow import MemberSizes
from bgen.nn.gpu.draws import uniform
from bgen.nn.random import Stream

_LEAST_AMOUNT = 1e-12
"""Relative to a typical one; amounts below it count as this."""


@dataclass
class Members:
    """Sets of members.

    Attributes
    ----------
    own
        int64 ``[..., K]``: number of a member of training, -1 where there is none or it is new.
    vector
        int64 ``[..., K]``: row of its vector, -1 if nothing is known by its name.
    amount
        float32 ``[..., K]`` in the unit of training; NaN: given without amount.
    there
        bool ``[..., K]``: members of the set; the others are padding.
    told
        bool ``[...]``: whether the set is known; an empty set that is known is that of control cells.
    """

    own: Tensor
    vector: Tensor
    amount: Tensor
    there: Tensor
    told: Tensor

    def _each(self, change: Callable[[Tensor], Tensor]) -> Members:
        return Members(*(change(getattr(self, field.name)) for field in fields(self)))

    def to(self, device: torch.device, non_blocking: bool = False) -> Members:
        """Return the same on a device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    @property
    def nothing(self) -> Members:
        """Empty sets in their place, as of control cells."""
        return Members(self.own, self.vector, self.amount, torch.zeros_like(self.there), torch.ones_like(self.told))

    @classmethod
    def stack(cls, sets: Sequence[Members], dim: int) -> Members:
        """Put sets beside each other along a new leading axis."""
        return cls(*(torch.stack([getattr(one, part.name) for one in sets], dim) for part in fields(cls)))

    def flatten(self) -> Members:
        """Return the sets along one leading axis."""
        lead = self.told.dim()
        return self._each(lambda part: part.flatten(0, lead - 1))

    def expand(self, *sizes: int) -> Members:
        """Repeat sets along leading axes of size 1."""
        lead = self.told.dim()
        return self._each(lambda part: part.expand(*sizes, *part.shape[lead:]))


class MemberEmbedding(nn.Module):
    """Embedding of sets of members.

    Parameters
    ----------
    sizes
        P, L, K, V, E.
    width
        C.
    """

    decayed = ()
    vectors: Tensor
    label_own: Tensor
    label_vector: Tensor
    typical_amount: Tensor

    def __init__(self, sizes: MemberSizes, width: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.register_buffer("vectors", torch.zeros(sizes.names, sizes.vector))
        self.register_buffer("label_own", torch.full((sizes.labels, sizes.largest), -1))
        self.register_buffer("label_vector", torch.full((sizes.labels, sizes.largest), -1))
        self.register_buffer("typical_amount", torch.ones(()))
        self.own = nn.Embedding(sizes.members, width)
        self.known_by_name = nn.Linear(sizes.vector, width, bias=False) if sizes.vector else None
        self.log_threshold = nn.Parameter(torch.zeros(sizes.members))
        self.log_slope = nn.Parameter(torch.zeros(sizes.members))
        self.unknown = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.own.weight)

    @torch.no_grad()
    def describe(self, vectors: Tensor, label_own: Tensor, label_vector: Tensor, typical_amount: float) -> None:
        """Set what is known of the members: ``vectors [V, E]``, members of each label ``[L, K]`` (-1: padding)."""
        self.vectors.copy_(vectors)
        self.label_own.copy_(label_own)
        self.label_vector.copy_(label_vector)
        self.typical_amount.fill_(typical_amount)

    def of_labels(self, codes: Tensor, amounts: Tensor | None = None) -> Members:
        """Return the sets that labels ``codes [...]`` mean (-1: unknown), all members at ``amounts [...]``."""
        at = codes.clamp_min(0)
        own, vector = self.label_own[at], self.label_vector[at]
        told = codes >= 0
        there = (own >= 0) & told[..., None]
        amount = torch.full(codes.shape, torch.nan, device=codes.device) if amounts is None else amounts.float()
        return Members(own, vector, amount[..., None].expand(own.shape), there, told)

    def forward(self, members: Members, hidden: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the embedding ``[B, C]`` of sets ``[B]``, and the sum over members alone, zero where nothing is told.

        Parameters
        ----------
        hidden
            bool ``[B]``: sets that are taken as unknown.
        keys
            int64 ``[B]``: own rows are dropped (with the probability :attr:`MemberSizes.forget`) as these say; None:
            none is.
        """
        told = members.told & ~hidden
        own = members.own
        if keys is not None and self.sizes.forget > 0:
            forgotten = uniform(keys, Stream.FORGET, 1) < self.sizes.forget
            own = torch.where(forgotten & (members.vector >= 0), -1, own)
        row = self.own(own.clamp_min(0)) * (own >= 0)[..., None]
        if self.known_by_name is not None:
            named = self.known_by_name(self.vectors[members.vector.clamp_min(0)])
            row = row + named * (members.vector >= 0)[..., None]
        total = (row * (self.strength(members) * told[:, None])[..., None]).sum(1)
        return torch.where(told[:, None], total, self.unknown), total

    def strength(self, members: Members) -> Tensor:
        """``[..., K]``: r, from 0 (no amount) to 1; 1 where no amount is given."""
        at, trained = members.own.clamp_min(0), members.own >= 0
        slope = torch.where(trained, self.log_slope[at], 0.0).exp()
        threshold = torch.where(trained, self.log_threshold[at], 0.0)
        amount = (members.amount / self.typical_amount).clamp_min(0)
        ratio = (amount.nan_to_num(1.0).clamp_min(_LEAST_AMOUNT).log() - threshold) * slope
        response = torch.where(amount > 0, torch.sigmoid(ratio), 0.0)
        return torch.where(members.amount.isnan(), 1.0, response) * members.there

    def flops(self, points: int) -> int:
        """Floating-point operations of the forward pass for so many sets; see :mod:`bgen.nn.flops`."""
        return 2 * points * self.sizes.largest * self.sizes.vector * self.own.embedding_dim
