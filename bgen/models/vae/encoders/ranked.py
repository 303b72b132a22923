"""The encoder of a cell as a sentence of genes, as Geneformer does it: for comparison, since genes have no order.

The genes of a cell stand in the order of their counts, each over the median of the cells of training that express it;
the first K of them are tokens, with an embedding of their place. Counts themselves are not seen. Full attention among
the tokens follows, and their mean tells the state (Theodoris et al., Nature 2023, at the size of a VAE).

Most counts are 1, so most of the order is that of the medians. Ties go by the gene's number.

Axes: B cells, G genes, NNZ stored counts, K tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.gene_set import RankedEncoderConfig
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.models.vae.encoders.encoder import Encoder
from bgen.models.vae.gene_table import GeneTable
from bgen.models.vae.posterior import Posterior
from bgen.models.vae.token_block import FIRST_DROPOUT, TokenBlock
from bgen.nn.flops import layers
from bgen.nn.random import mix, unit_from_bits


class RankedEncoder(Encoder):
    """Genes in the order of their ranks to the mean and log-variance of the latent state."""

    decayed = ()
    median: Tensor

    def __init__(self, config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__()
        own = config.encoder
        assert isinstance(own, RankedEncoderConfig)
        self.genes = GeneTable(n_genes, own.rows)
        self.embed = nn.Linear(own.rows, own.width, bias=False)
        self.place = nn.Parameter(0.02 * torch.randn(own.genes, own.width))
        self.cell = nn.Parameter(torch.randn(own.width))
        self.register_buffer("median", torch.ones(n_genes))
        self.shuffled = own.shuffled
        self.token_blocks = nn.ModuleList(
            TokenBlock(own.width, own.heads, config.dropout, FIRST_DROPOUT + number, recompute=config.recompute)
            for number in range(own.token_blocks)
        )
        self.posterior = Posterior(own.width, config.latent, covariates)

    def forward(self, batch: CellBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Encoder`."""
        genes_BK, there_BK = self.sentence(batch, counts)
        tokens = F.embedding(genes_BK, self.embed(self.genes(batch.step))) + self.place
        tokens = torch.cat((self.cell.expand(len(batch), 1, -1), tokens), dim=1)
        there = F.pad(there_BK, (1, 0), value=True)  # also a cell without genes has one token
        for block in self.token_blocks:
            tokens = block(tokens, batch.keys, valid=there)
        mean = (tokens * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return self.posterior(mean, batch)

    def sentence(self, batch: CellBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers of the first genes int64 ``[B, K]``, and which places are taken, bool ``[B, K]``."""
        genes = batch.indices.long()
        score = counts / self.median.index_select(0, genes)
        if self.shuffled:
            score = torch.where(counts > 0, unit_from_bits(mix(genes)), 0.0)
        first = score.argsort(descending=True, stable=True)
        first = first[batch.rows.index_select(0, first).argsort(stable=True)]  # by cell, then by score, then by gene
        place = torch.arange(len(genes), device=genes.device) - batch.indptr.index_select(0, batch.rows)
        K = len(self.place)
        kept = (place < K) & (counts.index_select(0, first) > 0)
        at = batch.rows * (K + 1) + torch.where(kept, place, K)  # those that are left out share a last place
        sentence = genes.new_zeros(len(batch) * (K + 1)).scatter_(0, at, genes.index_select(0, first))
        there = torch.zeros_like(sentence, dtype=torch.bool).scatter_(0, at, kept)
        there_BK = there.view(-1, K + 1)[:, :K]
        return sentence.view(-1, K + 1)[:, :K] * there_BK, there_BK

    @torch.no_grad()
    def look_at(self, batch: CellBatch) -> None:
        """See :class:`Encoder`: it takes each gene's median share of a cell's counts, among cells that have some."""
        share = batch.counts / batch.library.index_select(0, batch.rows)
        order = share.argsort(stable=True)
        order = order[batch.indices.index_select(0, order).argsort(stable=True)]  # by gene, then by share
        number = torch.bincount(batch.indices.long(), minlength=len(self.median))
        begin = number.cumsum(0) - number
        seen = number > 0
        middle = share[order[begin[seen] + (number[seen] - 1) // 2]]
        self.median.fill_(middle.median())
        self.median[seen] = middle

    @torch.no_grad()
    def start_genes(self, known: int) -> None:
        """See :class:`Encoder`: a new gene says nothing but takes a place, by the median of all medians."""
        self.genes.start_genes(known)
        self.median[known:] = self.median[:known].median()

    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """See :class:`Encoder`."""
        yield from self.posterior.tables()
        if genes:
            yield from self.genes.tables()

    def flops(self, cells: int, nonzeros: int) -> int:
        """See :class:`Encoder`; places that are empty are computed, too."""
        tokens = 1 + len(self.place)
        blocks = sum(block.flops(cells, tokens) for block in self.token_blocks if isinstance(block, TokenBlock))
        return self.genes.flops() + layers(self.genes.n_genes, self.embed) + blocks + self.posterior.flops(cells)
