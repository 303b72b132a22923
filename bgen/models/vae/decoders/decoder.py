"""The base of all decoders: a decoder explains counts, and tells how it starts, how it grows and what it costs.

Axes: B cells, G genes, D latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import pandas as pd
from torch import Tensor, nn

from bgen.models.vae.gene_table import GeneTable


class Decoder(nn.Module, ABC):
    """Latent state to the parameters of the distribution of counts.

    It is made from ``(config: VAEConfig, n_genes: int, covariates: Mapping[str, int])``; the last maps covariates to
    their numbers of categories, and ``config.decoder`` is the section of its own settings.
    """

    @abstractmethod
    def forward(self, z: Tensor, obs: Mapping[str, Tensor], keys: Tensor | None) -> tuple[Tensor, ...]:
        """Return logits ``[B, G]``, log theta ``[G]`` and, for zinb, dropout logits ``[B, G]`` for ``z [B, D]``.

        ``obs`` has codes ``[B]`` by covariate; an absent one counts as unknown. ``keys [B]`` are needed for dropout. It
        returns tensors and not an object that holds them, because ZeRO 3 looks in a module's output for the tensors
        that gradients come back through.
        """

    @property
    @abstractmethod
    def log_theta(self) -> Tensor:
        """``[G]``: log inverse dispersion of each gene."""

    @abstractmethod
    def initialise_genes(self, mean_counts: Tensor) -> None:
        """Start at the genes' average proportions, from their mean counts ``[G]`` over training cells."""

    @abstractmethod
    def shift_genes(self, shifts: Tensor) -> None:
        """Move each gene's logit by its shift, whatever the state: shifts ``[G]``."""

    @abstractmethod
    def start_genes(self, known: int, shares: Tensor) -> None:
        """Let new genes (all but the first ``known``) start at their shares, whatever the state; change no old row.

        ``shares [G - known]`` are positive: counts of each new gene, in units of all counts of the known genes.
        """

    @abstractmethod
    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """Yield the parameters that fine-tuning trains while the network stays as it is: those with a row per category.

        Also the average level and dispersion of every gene and, with ``genes`` (genes were added), all parameters with
        a row per gene.
        """

    @property
    def vector_table(self) -> GeneTable | None:
        """The gene table that knows genes by vectors, whether training saw them or not; None: there is none."""
        return None

    def foretell_genes(self, trained: Tensor, state: Tensor) -> float:
        """Let new genes (all but the first ``len(trained)``) start at what their vectors foretell of them.

        Called only if there is a ``vector_table``, after :meth:`start_genes`, in evaluation mode.

        Parameters
        ----------
        trained
            ``[known genes]``, bool: those that training has seen, from which is learned what vectors foretell.
        state
            ``[1, D]``: the average one.

        Returns
        -------
        float
            R2 of the levels of trained genes that are left out (:func:`bgen.genes.foretell.left_out_r2`).
        """
        raise TypeError(f"{type(self).__name__} has a vector_table and must say what vectors foretell (foretell_genes)")

    def describe_genes(self, genes: pd.DataFrame) -> list[str]:
        """Read the files that the settings name, for the genes of the table; return sentences for the user.

        Called once, before training; a trained model has it in its buffers. Most decoders read none.
        """
        return []

    @abstractmethod
    def flops(self, cells: int) -> int:
        """Floating-point operations of the forward pass over so many cells."""
