"""What every decoder is: it explains counts, and says how it starts and grows, and what it computes.

Axes: B cells, G genes, D latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class Decoder(nn.Module, ABC):
    """Latent state to the parameters of the distribution of counts.

    Made from ``(config: VAEConfig, n_genes: int, covariates: Mapping[str, int])``, covariates to their numbers of
    categories; ``config.decoder`` is the section of its own settings.
    """

    @abstractmethod
    def forward(self, z: Tensor, obs: Mapping[str, Tensor], keys: Tensor | None) -> tuple[Tensor, ...]:
        """Return logits ``[B, G]``, log theta ``[G]`` and, for zinb, dropout logits ``[B, G]`` for ``z [B, D]``.

        ``obs`` has codes ``[B]`` by covariate; an absent one counts as unknown. ``keys [B]`` are needed for dropout.
        Tensors, not an object that holds them: ZeRO 3 finds in a module's output what its gradients come in by.
        """

    @property
    @abstractmethod
    def log_theta(self) -> Tensor:
        """``[G]``: log inverse dispersion of each gene."""

    @abstractmethod
    def initialise_genes(self, mean_counts: Tensor) -> None:
        """Start at the genes' average proportions, from their mean counts ``[G]`` over training cells."""

    @abstractmethod
    def start_genes(self, known: int, shares: Tensor) -> None:
        """Let all genes but the first ``known`` start at their shares, whatever the state, and change no old row.

        ``shares [G - known]`` are positive: counts of each new gene, in units of all counts of the known genes.
        """

    @abstractmethod
    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """Yield what fine-tuning trains where the network stays as it is: what has a row for each category.

        Also every gene's average level and dispersion and, with ``genes``, as genes were added, all that has a row
        for each gene.
        """

    @abstractmethod
    def flops(self, cells: int) -> int:
        """Floating-point operations of the forward pass over so many cells."""
