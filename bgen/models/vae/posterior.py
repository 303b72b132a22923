"""From what an encoder has read of a cell to the posterior of its state: the last layer that encoders of tokens share.

The latent state may be tokens itself, each from its own share of the tokens that were read, by the same layer: what a
velocity network that mixes along tokens (bgen/models/backbones/token_stack.py) then takes apart.

Axes: B cells, I numbers that were read, D latent size, K tokens of the latent state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from bgen.data.batch import CellBatch
from bgen.models.vae.covariates import Covariates
from bgen.nn.flops import layers


class Posterior(nn.Module):
    """Covariates, a norm, and one layer to mean and log-variance.

    Parameters
    ----------
    inputs, latent, tokens
        I, D, K; K divides both.
    covariates
        Covariates to their numbers of categories.
    """

    def __init__(self, inputs: int, latent: int, covariates: Mapping[str, int], tokens: int = 1) -> None:
        super().__init__()
        self.tokens = tokens
        self.covariates = Covariates(covariates, inputs)
        self.norm = nn.LayerNorm(inputs // tokens)
        self.head = nn.Linear(inputs // tokens, 2 * latent // tokens)

    def forward(self, read: Tensor, batch: CellBatch) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance ``[B, D]`` in float32 for ``[B, I]``."""
        read = self.norm(self.covariates(read, batch.obs).unflatten(1, (self.tokens, -1)))
        mean, logvar = self.head(read).float().chunk(2, dim=2)
        return mean.flatten(1), logvar.flatten(1).clamp(-12.0, 8.0)

    def tables(self) -> Iterator[nn.Parameter]:
        """Yield the parameters with a row per category."""
        yield from self.covariates.parameters()

    def flops(self, cells: int) -> int:
        """Floating-point operations of the forward pass."""
        return layers(cells * self.tokens, self)
