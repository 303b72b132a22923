"""The codec without a network: the state of a cell is the logarithm of its counts, gene by gene.

    z_g = log(1 + 10,000 x_g / library),    mu = library * exp(l_g) y_g / sum_g' exp(l_g') y_g',  y = max(exp(z) - 1, 0)

A flow on it generates the logarithms of all genes directly, with no latent space between. Nothing is trained here; mean
and spread of the states, and what the draw of counts needs, are statistics of the training cells. The levels l of the
genes are 0 unless a flow has fitted them to its cells (:mod:`bgen.models.vae.levels`).

A real cell comes back with its own counts, but for rounding of floats. What is generated is no logarithm of a count, so
``counts`` says how integers come of it: the nearest one, a Poisson draw, or one from a negative binomial. Its theta is
that of the gene among all training cells,

    theta_g = sum mu^2 / (sum (x - mu)^2 - sum mu),    mu = library * (the gene's share of all counts),

by moments: what cells differ in is part of it, so a draw adds that difference once more.

Axes: B cells, G genes, which are the dimensions D of the state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bgen.config.flow import LogCountsConfig
from bgen.data.batch import CellBatch
from bgen.genes.expression import TARGET_SUM
from bgen.models.codec import CountsCodec, log_library
from bgen.models.likelihoods.negative_binomial import LOG_THETA_RANGE, NegativeBinomial
from bgen.models.vae.sparse_linear import densify, log_normalise
from bgen.models.vae.whitening import WhiteningStats

LEAST = 1e-8
"""Counts per 10,000 that every gene has at least in :meth:`LogCounts.decode`, so that logarithms are finite."""

MOST_GENES = 5_000
"""Genes up to which a flow on their logarithms is of a usual size; its first and last layer have as many columns."""

_POISSON = LOG_THETA_RANGE[1]


class RoundedCounts(NegativeBinomial):
    """Counts that are expectations, rounded; as a likelihood, Poisson."""

    @torch.no_grad()
    def sample(self, keys: Tensor) -> Tensor:
        """Return int32 ``[B, G]``, whatever the keys."""
        return self.rate.round().int()


class LogCountsStats(WhiteningStats):
    """Sums over cells for :meth:`LogCounts.fit_whitening`: those of the states, then those of the counts.

    The last are 2 + 3 G numbers: sums of library and of its square, and by gene of x, x^2 and x * library.
    """

    def __init__(self, n_genes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(n_genes, device)
        self.sums = torch.cat((self.sums, self.sums.new_zeros(2 + 3 * n_genes)))

    def add_counts(self, batch: CellBatch) -> None:
        """Add the counts of a batch."""
        library, counts = batch.library.to(self.sums), batch.counts.to(self.sums)
        by_gene = self.sums.new_zeros(3, batch.n_genes)
        for place, values in enumerate((counts, counts.square(), counts * library[batch.rows])):
            by_gene[place].index_add_(0, batch.indices.long(), values)
        self.sums[1 + 2 * self.size :] += torch.cat(
            (torch.stack((library.sum(), library.square().sum())), by_gene.flatten())
        )

    def log_theta(self) -> Tensor:
        """Return ``[G]``, float32: log inverse dispersion by moments; a gene that varies no more is Poisson."""
        library, squared, *rest = self.sums[1 + 2 * self.size :]
        x, square, with_library = torch.stack(rest).view(3, -1)
        share = x / library.clamp_min(1.0)
        of_mean = share.square() * squared
        excess = square - 2 * share * with_library + of_mean - share * library
        theta = torch.where(excess > 0, of_mean / excess.clamp_min(1e-300), torch.inf)
        return theta.log().clamp(*LOG_THETA_RANGE).float()


class LogCounts(CountsCodec):
    """Logarithms of counts as states; see the top of this file.

    Parameters
    ----------
    config
        Settings.
    n_genes
        G.
    """

    levels: Tensor
    log_theta: Tensor

    def __init__(self, config: LogCountsConfig, n_genes: int) -> None:
        super().__init__(n_genes, n_genes, {})
        self.config = config
        self.register_buffer("levels", torch.zeros(n_genes))
        self.register_buffer("log_theta", torch.full((n_genes,), _POISSON))

    def encode(self, batch: CellBatch) -> tuple[Tensor, Tensor]:
        """See :class:`CountsCodec`; there is no variance."""
        state = self.states(batch)
        return state, torch.full_like(state, -torch.inf)

    def states(self, batch: CellBatch) -> Tensor:
        """See :class:`CountsCodec`; nothing is drawn."""
        values = log_normalise(batch, batch.counts, TARGET_SUM)
        return densify(batch.rows, batch.indices, values, (len(batch), self.n_genes))

    def decode(
        self, z: Tensor, library: Tensor, covariates: Mapping[str, Tensor], keys: Tensor | None = None
    ) -> NegativeBinomial:
        """See :class:`bgen.models.codec.Codec`; a state beyond what counts can be is taken as the nearest that can."""
        per_ten_thousand = z.float().expm1().clamp(LEAST, TARGET_SUM)
        logits = per_ten_thousand.log() + self.levels
        if self.config.counts == "rounded":
            return RoundedCounts(logits, library, torch.full_like(self.log_theta, _POISSON))
        return NegativeBinomial(logits, library, self.log_theta)

    def shift_genes(self, by: Tensor) -> None:
        """See :class:`CountsCodec`."""
        self.levels += by.to(self.levels)

    def whitening_stats(self) -> LogCountsStats:
        """See :class:`CountsCodec`."""
        return LogCountsStats(self.n_genes, self.latent_mean.device)

    @torch.no_grad()
    def accumulate_whitening(self, stats: WhiteningStats, batch: CellBatch) -> None:
        """See :class:`CountsCodec`; also adds counts."""
        assert isinstance(stats, LogCountsStats), "its own"
        stats.add(self.states(batch), log_library(batch))
        stats.add_counts(batch)

    def fit_whitening(self, stats: WhiteningStats) -> None:
        """See :class:`CountsCodec`; with ``scale: one`` all genes have the spread of an average one."""
        assert isinstance(stats, LogCountsStats), "its own"
        super().fit_whitening(stats)
        if self.config.scale == "one":
            _, variance = stats.moments()
            self.latent_std[:-1] = variance[:-1].mean().sqrt().clamp_min(1e-6).float()
        if self.config.counts == "nb":
            self.log_theta.copy_(stats.log_theta())

    def latents_flops(self, cells: int, nonzeros: int) -> int:
        """See :class:`bgen.models.codec.Codec`: there is no product in it."""
        return 0
