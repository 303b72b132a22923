"""The encoder of a cell as a set of genes, each as heavy as its count says, which a few tokens read by attention.

    t_m = seed_m + W_o LN(y_m),   y_m: what token m reads (bgen/models/vae/set_read.py)
    blocks of attention among the tokens, then one layer from all of them to mean and log-variance, or by latent tokens

Its settings name known models. Free tokens with blocks among them are the pooling of the Set Transformer (Lee et al.,
ICML 2019: PMA, then SAB). ``attention: false`` is DeepSets (Zaheer et al., NeurIPS 2017) with a mean for its sum; with
the sum, and values in proportion to the logarithm, it is the first layer of ``state_vector``. ``weighting: molecules``
takes the cell as a multiset of molecules: the softmax runs over molecules, not genes.

Beside free tokens there may be tokens of which it is known which genes they should read (bgen/genes/groups.py): sets of
genes, which also know which set lies in which, and regulators, which also read the signs of what they act on. What is
read is a mean, which does not say how much there was to read: whether a pathway is busy. So these tokens are told that,
too, as a share of what all of them have read.

Norms stand behind the read and never before it: LN(x e_g) would be the same for every count x > 0.

Axes: B cells, G genes, M tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.gene_set import GeneSetEncoderConfig
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.genes.groups import Groups, gene_set_groups, regulator_groups
from bgen.models.vae.encoders.encoder import Encoder
from bgen.models.vae.gene_table import GeneTable
from bgen.models.vae.posterior import Posterior
from bgen.models.vae.set_read import SetRead
from bgen.models.vae.sparse_linear import log_normalise
from bgen.models.vae.token_block import FIRST_DROPOUT, TokenBlock
from bgen.models.vae.token_prior import TokenPrior
from bgen.nn.flops import layers

SCALE = 10_000.0
"""Counts per cell to which logarithms of counts are normalised."""

_AMOUNT = 100.0
"""Shares of what known tokens have read are told as log(1 + this times the share)."""

_EPS = 1e-8
"""Added to the variance of what is read, which is small: the mean of many genes."""


class GeneSetEncoder(Encoder):
    """A set of genes to the mean and log-variance of the latent state."""

    decayed = ()
    sign: Tensor | None
    relations: Tensor | None

    def __init__(self, config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__()
        own = config.encoder
        assert isinstance(own, GeneSetEncoderConfig)
        self.config = own
        of_groups, of_network = (0 if part is None else part.tokens for part in (own.groups, own.network))
        tokens = own.tokens + of_groups + of_network
        self.genes = GeneTable(n_genes, own.rows, own.vectors)
        self.read = SetRead(own.rows, tokens, own.width, own.heads, values=own.values, attention=own.attention)
        self.out = nn.Linear(own.width, own.width, bias=False)
        self.seed = nn.Parameter(torch.randn(tokens, own.width))
        self.priors = nn.ModuleDict()
        if own.groups is not None or own.network is not None:
            self.of_amount = nn.Linear(own.heads, own.width, bias=False)
        if own.groups is not None:
            self.priors["groups"] = TokenPrior(n_genes, of_groups, hard=own.groups.bias == "hard")
        if own.network is not None:
            self.priors["network"] = TokenPrior(n_genes, of_network, hard=own.network.bias == "hard")
            self.of_sign = nn.Linear(own.heads, own.width, bias=False)
        self.register_buffer("sign", torch.zeros(n_genes, of_network) if of_network else None)
        related = 2 * (own.groups is not None and own.groups.hierarchy)
        related += 2 * (own.network is not None and own.network.relations)
        self.register_buffer("relations", torch.zeros(related, tokens, tokens) if related else None)
        self.token_blocks = nn.ModuleList(
            TokenBlock(own.width, own.heads, config.dropout, FIRST_DROPOUT + number, related, config.recompute)
            for number in range(own.token_blocks)
        )
        self.posterior = Posterior(tokens * own.width, config.latent, covariates, config.latent_tokens)

    def forward(self, batch: CellBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Encoder`."""
        tokens = self.tokens(batch, counts)
        for block in self.token_blocks:
            tokens = block(tokens, batch.keys, self.relations)
        return self.posterior(tokens.flatten(1), batch)

    def tokens(self, batch: CellBatch, counts: Tensor) -> Tensor:
        """Return the tokens as they were read, ``[B, M, D]``; that of a token with nothing to read is its seed.

        What is read is normalised for each head. So a gene whose row is zero, which adds nothing to the numerator and
        the same to the denominator of all tokens, changes nothing.
        """
        own = self.config
        log = log_normalise(batch, counts, SCALE) if own.values or own.weighting == "log" else counts
        weight = {"molecules": counts, "log": log, "genes": (counts > 0).to(counts.dtype)}[own.weighting]
        y, signs, amount = self.read(self.genes(batch.step), batch, weight, log, self._factor(), self.sign)
        tokens = self.seed + self.out(F.layer_norm(y, y.shape[-1:], eps=_EPS).flatten(2))
        if not self.priors:
            return tokens
        amount = amount[:, own.tokens :]
        known = self.of_amount(torch.log1p(_AMOUNT * amount / amount.sum(1, keepdim=True).clamp_min(1e-12)))
        if self.sign is not None:
            of_groups = known.shape[1] - signs.shape[1]
            known = torch.cat((known[:, :of_groups], known[:, of_groups:] + self.of_sign(signs)), dim=1)
        return torch.cat((tokens[:, : own.tokens], tokens[:, own.tokens :] + known), dim=1)

    def _factor(self) -> Tensor | None:
        """Factors of the attention weights, ``[G, M]``: 1 for free tokens, and what is known for the others."""
        if not self.priors:
            return None
        known = [prior() for prior in self.priors.values()]
        return torch.cat((known[0].new_ones(len(known[0]), self.config.tokens), *known), dim=1)

    @property
    def vector_table(self) -> GeneTable | None:
        """See :class:`Encoder`."""
        return None if self.config.vectors is None else self.genes

    def describe_genes(self, genes: pd.DataFrame) -> list[str]:
        """See :class:`Encoder`."""
        own, said = self.config, self.genes.describe(genes)
        if own.groups is not None:
            groups = gene_set_groups(own.groups, genes)
            said.append(groups.sentence)
            self._take_over(groups, "groups", own.tokens, 0 if own.groups.hierarchy else None)
        if own.network is not None:
            groups = regulator_groups(own.network, genes)
            said.append(groups.sentence)
            self._take_over(
                groups, "network", len(self.seed) - own.network.tokens, -2 if own.network.relations else None
            )
            assert self.sign is not None
            self.sign.copy_(torch.from_numpy(groups.sign))
        return said

    def _take_over(self, groups: Groups, name: str, first: int, kind: int | None) -> None:
        """Let the tokens from ``first`` on read groups; ``kind`` is the first of their two relations, if they count."""
        prior = self.priors[name]
        assert isinstance(prior, TokenPrior)
        prior.describe(groups)
        if kind is not None:
            assert self.relations is not None
            place = slice(first, first + len(groups.names))
            for number, relation in enumerate(groups.relations):
                self.relations[kind + number, place, place] = torch.from_numpy(relation)

    @torch.no_grad()
    def start_genes(self, known: int) -> None:
        """See :class:`Encoder`."""
        self.genes.start_genes(known)

    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """See :class:`Encoder`."""
        yield from self.posterior.tables()
        if genes:
            yield from self.genes.tables()

    def flops(self, cells: int, nonzeros: int) -> int:
        """See :class:`Encoder`; the tables over genes are made once, for all of the cells."""
        tokens = len(self.seed)
        signed = 0 if self.sign is None else self.sign.shape[1]
        read = self.genes.flops() + self.read.flops(self.genes.n_genes, nonzeros, signed)
        read += layers(cells * tokens, self.out) + (0 if self.sign is None else layers(cells * signed, self.of_sign))
        read += layers(cells * (tokens - self.config.tokens), self.of_amount) if self.priors else 0
        blocks = sum(block.flops(cells, tokens) for block in self.token_blocks if isinstance(block, TokenBlock))
        return read + blocks + self.posterior.flops(cells)

    def training_flops(self, cells: int, nonzeros: int) -> int:
        """See :class:`Encoder`: the counts need no gradient."""
        signed = 0 if self.sign is None else self.sign.shape[1]
        known = self.genes.flops()  # the vectors need no gradient
        return 3 * self.flops(cells, nonzeros) - self.read.sparse_flops(nonzeros, signed) - known
