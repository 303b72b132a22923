"""What every encoder is: it reads counts, and says how it grows, what fine-tuning trains, and what it computes.

Axes: B cells, G genes, D latent size, NNZ stored counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from bgen.data.batch import CellBatch


class Encoder(nn.Module, ABC):
    """Counts to the mean and log-variance of the latent state.

    Made from ``(config: VAEConfig, n_genes: int, covariates: Mapping[str, int])``, covariates to their numbers of
    categories; ``config.encoder`` is the section of its own settings.
    """

    @abstractmethod
    def forward(self, batch: CellBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance ``[B, D]`` in float32; ``counts [NNZ]`` stand in for the batch's own.

        What is random is drawn from ``batch.keys``, so that no cell feels the others of its batch.
        """

    @abstractmethod
    def start_genes(self, known: int) -> None:
        """Let all genes but the first ``known`` start as if they said nothing of the state, and change no old row."""

    @abstractmethod
    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """Yield what fine-tuning trains where the network stays as it is: what has a row for each category.

        With ``genes``, as genes were added, also what has a row for each gene.
        """

    @abstractmethod
    def flops(self, cells: int, nonzeros: int) -> int:
        """Floating-point operations of the forward pass over so many cells with so many stored counts in all."""

    def training_flops(self, cells: int, nonzeros: int) -> int:
        """Floating-point operations of forward and backward pass; less where an input needs no gradient."""
        return 3 * self.flops(cells, nonzeros)
