"""The base of all encoders: an encoder reads counts, and tells how it grows, what fine-tuning trains and what it costs.

Axes: B cells, G genes, D latent size, NNZ stored counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import pandas as pd
from torch import Tensor, nn

from bgen.data.batch import CellBatch
from bgen.models.vae.gene_table import GeneTable


class Encoder(nn.Module, ABC):
    """Counts to the mean and log-variance of the latent state.

    It is made from ``(config: VAEConfig, n_genes: int, covariates: Mapping[str, int])``; the last maps covariates to
    their numbers of categories, and ``config.encoder`` is the section of its own settings.
    """

    @abstractmethod
    def forward(self, batch: CellBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance ``[B, D]`` in float32; ``counts [NNZ]`` stand in for the batch's own.

        All randomness is drawn from ``batch.keys``, so that a cell does not depend on the others of its batch.
        """

    @abstractmethod
    def start_genes(self, known: int) -> None:
        """Let new genes (all but the first ``known``) start as if they told nothing of the state; change no old row."""

    @abstractmethod
    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """Yield the parameters that fine-tuning trains while the network stays as it is: those with a row per category.

        With ``genes`` (genes were added), also those with a row per gene.
        """

    @abstractmethod
    def flops(self, cells: int, nonzeros: int) -> int:
        """Floating-point operations of the forward pass over so many cells with so many stored counts in all."""

    @property
    def vector_table(self) -> GeneTable | None:
        """The gene table that knows genes by vectors, whether training saw them or not; None: there is none."""
        return None

    def describe_genes(self, genes: pd.DataFrame) -> list[str]:
        """Read the files that the settings name, for the genes of the table; return sentences for the user.

        Called once, before training; a trained model has it in its buffers. Most encoders read none.
        """
        return []

    def look_at(self, batch: CellBatch) -> None:
        """Take statistics from a sample of the cells of training, before it begins; most encoders need none."""

    def training_flops(self, cells: int, nonzeros: int) -> int:
        """Floating-point operations of forward and backward pass; less where an input needs no gradient."""
        return 3 * self.flops(cells, nonzeros)
