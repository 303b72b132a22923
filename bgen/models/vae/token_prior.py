"""What is known of which genes a token should read: the members of a set, or what a regulator acts on.

Hard, a token reads these genes alone; soft, the logit of attention is raised by gate x strength, with a learned gate
for each token.

Axes: G genes, P tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bgen.genes.groups import Groups

_START = 2.0
"""What the logits of members are raised by at first: about sevenfold weights."""


class TokenPrior(nn.Module):
    """Factors of the attention weights of P tokens, ``[G, P]``.

    Parameters
    ----------
    n_genes, tokens
        G, P.
    hard
        Whether other genes are not read at all.
    """

    decayed = ()
    strength: Tensor

    def __init__(self, n_genes: int, tokens: int, *, hard: bool) -> None:
        super().__init__()
        self.register_buffer("strength", torch.zeros(n_genes, tokens))
        self.gate = None if hard else nn.Parameter(torch.full((tokens,), _START))

    def forward(self) -> Tensor:
        """Return the factors."""
        if self.gate is None:
            return (self.strength > 0).float()
        return (self.gate.float() * self.strength).exp()

    def describe(self, groups: Groups) -> None:
        """Take over what is known."""
        self.strength.copy_(torch.from_numpy(groups.strength))
