"""Negative-binomial and zero-inflated likelihoods of counts over all genes.

    rho = softmax(logits),  mu = library * rho,  x ~ NB(mean mu, variance mu + mu^2 / theta)

theta is the inverse dispersion, one per gene. The zero-inflated form replaces each count by zero with probability
``sigmoid(dropout_logits)``. Everything here is computed in float32 (or float64 where float64 is given), also under
autocast; logits are kept as they come.

Each distribution is evaluated in two ways: :meth:`log_prob` takes dense counts and the textbook formula, as the
reference; :meth:`log_prob_sparse` takes a batch and is what training uses (:mod:`bgen.models.likelihoods.sparse`, and
on GPUs :mod:`bgen.models.likelihoods.fused`).

Axes: B cells, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bgen.data.batch import CellBatch
from bgen.models.likelihoods import fused
from bgen.models.likelihoods.sampling import sample_negative_binomial
from bgen.models.likelihoods.sparse import SparseNB, log_softmax_at, nonzero_term
from bgen.nn.gpu.draws import uniform
from bgen.nn.precision import without_autocast
from bgen.nn.random import Stream

LOG_THETA_RANGE = (-9.0, 14.0)
"""Range of inverse dispersions: below it a gene is never seen, above it the gene is Poisson to 1e-6."""

SMALLEST_LIBRARY = 1e-6
"""Library of a cell without counts, so that its logarithm is finite."""


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass
class NegativeBinomial:
    """B x G independent negative binomials.

    Attributes
    ----------
    logits
        ``[B, G]``: unnormalised log proportions of the genes.
    library
        ``[B]``: total counts.
    log_theta
        ``[G]``: log inverse dispersion.
    """

    logits: Tensor
    library: Tensor
    log_theta: Tensor

    def __post_init__(self) -> None:
        precision = torch.float64 if self.logits.dtype == torch.float64 else torch.float32
        self.library = self.library.to(precision).clamp_min(SMALLEST_LIBRARY)
        self.log_theta = self.log_theta.to(precision).clamp(*LOG_THETA_RANGE)

    @property
    def rate(self) -> Tensor:
        """``[B, G]``: mu, the mean of the negative binomial."""
        return torch.softmax(_full_precision(self.logits), dim=1) * self.library[:, None]

    @property
    def mean(self) -> Tensor:
        """``[B, G]``: expected counts."""
        return self.rate

    def log_prob(self, counts: Tensor) -> Tensor:
        """Log-probability of each of the dense counts ``[B, G]``, by the textbook formula."""
        log_mu = torch.log_softmax(_full_precision(self.logits), dim=1) + self.library.log()[:, None]
        theta = self.log_theta.exp()
        log_total = torch.logaddexp(log_mu, self.log_theta)
        return (
            torch.lgamma(counts + theta)
            - torch.lgamma(theta)
            - torch.lgamma(counts + 1)
            + theta * (self.log_theta - log_total)
            + counts * (log_mu - log_total)
        )

    def log_prob_sparse(self, batch: CellBatch) -> Tensor:
        """Log-probability of each cell ``[B]``."""
        with without_autocast(self.logits):
            if fused.usable(self.logits):
                return fused.log_prob(self.logits, None, self.log_theta, self.library, batch)
            counts = batch.counts.to(self.library.dtype)
            return SparseNB.apply(_full_precision(self.logits), self.log_theta, self.library, batch, counts)

    def rate_given(self, counts: Tensor) -> Tensor:
        """Return the expected Poisson rate behind each of the dense counts ``[B, G]``.

        A negative binomial is a Poisson variable whose rate is a gamma variable. Given the count x, the mean of that
        rate is (x + theta) mu / (mu + theta).
        """
        mu, theta = self.rate, self.log_theta.exp()
        return (counts + theta) * (mu / (mu + theta))

    @torch.no_grad()
    def sample(self, keys: Tensor) -> Tensor:
        """Draw counts, int32 ``[B, G]``: a pure function of the parameters and of ``keys`` ``[B]``."""
        return sample_negative_binomial(self.rate, self.log_theta.exp(), keys)


@dataclass
class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """B x G independent mixtures of a zero and a negative binomial.

    Attributes
    ----------
    dropout_logits
        ``[B, G]``: log-odds that a count is replaced by zero.
    """

    dropout_logits: Tensor

    @property
    def mean(self) -> Tensor:
        """``[B, G]``: expected counts."""
        return self.rate * torch.sigmoid(-_full_precision(self.dropout_logits))

    def log_prob(self, counts: Tensor) -> Tensor:
        """Log-probability of each of the dense counts ``[B, G]``, by the textbook formula."""
        negative_binomial, dropout = super().log_prob(counts), _full_precision(self.dropout_logits)
        kept = negative_binomial - F.softplus(dropout)
        zero = torch.logaddexp(negative_binomial, dropout) - F.softplus(dropout)
        return torch.where(counts == 0, zero, kept)

    def log_prob_sparse(self, batch: CellBatch) -> Tensor:
        """Log-probability of each cell ``[B]``: that of all zeros, corrected at the non-zeros."""
        with without_autocast(self.logits):
            if fused.usable(self.logits):
                return fused.log_prob(self.logits, self.dropout_logits, self.log_theta, self.library, batch)
            logits, dropout = _full_precision(self.logits), _full_precision(self.dropout_logits)
            rows, counts = batch.rows, batch.counts.to(logits.dtype)
            flat = rows * logits.shape[1] + batch.indices
            theta = self.log_theta.exp()
            rho = torch.softmax(logits, dim=1)
            log_mu = log_softmax_at(logits, rho, rows, flat) + self.library.log().index_select(0, rows)
            log1p_ratio = torch.log1p(rho * self.library[:, None] / theta)
            zero = -theta * log1p_ratio
            inflated = torch.logaddexp(zero, dropout)
            at_nonzero = nonzero_term(
                counts, log_mu, log1p_ratio.view(-1).index_select(0, flat), theta.index_select(0, batch.indices)
            )
            at_nonzero = at_nonzero + (zero - inflated).view(-1).index_select(0, flat)
            correction = torch.segment_reduce(at_nonzero, "sum", offsets=batch.indptr, initial=0.0)
            return (inflated - F.softplus(dropout)).sum(dim=1) + correction

    def rate_given(self, counts: Tensor) -> Tensor:
        """See :class:`NegativeBinomial`; the rate of what was replaced by zero is zero."""
        log_zero = -self.log_theta.exp() * torch.log1p(self.rate / self.log_theta.exp())
        kept = torch.where(counts == 0, torch.sigmoid(log_zero - _full_precision(self.dropout_logits)), 1.0)
        return super().rate_given(counts) * kept

    @torch.no_grad()
    def sample(self, keys: Tensor) -> Tensor:
        """Draw counts, int32 ``[B, G]``: a pure function of the parameters and of ``keys`` ``[B]``."""
        lost = torch.sigmoid(_full_precision(self.dropout_logits))
        kept = uniform(keys, Stream.ZERO_INFLATION, self.logits.shape[1]) > lost
        return super().sample(keys) * kept
