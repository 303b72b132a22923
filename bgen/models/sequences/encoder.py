"""Sequences to vectors of genes: a network over true positions.

    x_p = mean over positions l of p of E[word of k bases at l]
    x <- x + dropout(mixer(norm(x)));   x <- x + W dropout(GELU(V norm(x)))      K times
    f = W_f dropout(BatchNorm [mean over p of x_p, max over p of x_p])

Without blocks the mean is a linear map of the shares of words, as ridge regression on k-mers has them; the mixer adds
where they stand and what stands around them. The norm over genes is there because shares of words differ so little from
gene to gene. Words with a base that is not known are left out, so what lies beyond the end of a shorter sequence
changes nothing. All mixers see both directions: what regulates a gene stands on both sides of its start.

Axes: B sequences, L positions, P positions after pooling, C channels, F size of a vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.backbone import AttentionConfig, BackboneConfig, HyenaConfig, Mamba2Config, TimeConfig
from bgen.config.sequences import SequenceConfig
from bgen.genes.sequences import UNKNOWN
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.mixers.registry import TIME_MIXERS
from bgen.nn.norm import RMSNorm
from bgen.nn.points import Points

_NEIGHBOURS = 5
"""Width of the convolution that stands where a mixer would, in a network without one."""

_HEADS = 4
_LONGEST_PERIOD = 1000.0
"""Of the rotary angles of attention, in pooled positions."""


class Convolution(Mixer):
    """A plain convolution over a few neighbours: the block of a CNN."""

    needs_regular_grid = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, _NEIGHBOURS, padding="same")

    def forward(self, x_BLD: Tensor, points: Points) -> Tensor:
        """See :class:`Mixer`."""
        return self.convolution(points.blank(x_BLD).mT).mT

    def flops(self, B: int, L: int) -> int:
        """See :class:`Mixer`."""
        return 2 * B * L * self.convolution.weight.numel()


def make_mixer(config: SequenceConfig, length: int) -> Mixer:
    """Return the mixer over up to ``length`` positions."""
    C = config.channels
    if config.mixer == "convolution":
        return Convolution(C)
    backbone = BackboneConfig(
        name="ssm",
        width=C,
        time=TimeConfig(mixer=config.mixer, direction="bidirectional", real_time=False, tracked=True),
        attention=AttentionConfig(heads=_HEADS, longest_period=_LONGEST_PERIOD),
        hyena=HyenaConfig(max_length=length),
        mamba2=Mamba2Config(head_width=16, state=16),
    )
    return TIME_MIXERS[config.mixer](backbone)


class Block(nn.Module):
    """A mixer over positions, then a layer for each of them; both are added to what there was."""

    def __init__(self, config: SequenceConfig, length: int) -> None:
        super().__init__()
        C = config.channels
        self.mixer_norm, self.norm = RMSNorm(C), RMSNorm(C)
        self.mixer = make_mixer(config, length)
        self.inner, self.outer = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BPC: Tensor, points: Points) -> Tensor:
        """Return ``[B, P, C]``."""
        x_BPC = x_BPC + self.dropout(self.mixer(self.mixer_norm(x_BPC), points))
        return x_BPC + self.outer(self.dropout(F.gelu(self.inner(self.norm(x_BPC)))))


class Words(nn.Module):
    """A learned row for each word of k bases, averaged over neighbouring positions."""

    decayed = ("rows",)

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.word, self.pool = config.word, config.pool
        self.unknown = UNKNOWN**config.word
        self.rows = nn.Parameter(torch.randn(self.unknown + 1, config.channels))

    def forward(self, codes_BL: Tensor) -> Tensor:
        """Return ``[B, P, C]`` for codes whose length is a multiple of ``pool``; of no known word zero."""
        B, L = codes_BL.shape
        codes_BL = F.pad(codes_BL.long(), (0, self.word - 1), value=UNKNOWN)
        word_BL, known_BL = codes_BL.new_zeros(B, L), torch.ones_like(codes_BL[:, :L], dtype=torch.bool)
        for step in range(self.word):
            letter_BL = codes_BL[:, step : step + L]
            word_BL, known_BL = UNKNOWN * word_BL + letter_BL, known_BL & (letter_BL < UNKNOWN)
        word_BL = torch.where(known_BL, word_BL, self.unknown)
        bags = word_BL.reshape(-1, self.pool)
        return F.embedding_bag(bags, self.rows, mode="mean", padding_idx=self.unknown).unflatten(0, (B, -1))


class SequenceEncoder(nn.Module):
    """Codes of sequences ``[B, L]`` to vectors ``[B, F]``.

    Parameters
    ----------
    config
        Its sizes.
    length
        L, at most.
    """

    def __init__(self, config: SequenceConfig, length: int) -> None:
        super().__init__()
        self.pool = config.pool
        C, P = config.channels, -(-length // config.pool)
        self.words = Words(config)
        self.blocks = nn.ModuleList(Block(config, P) for _ in range(config.blocks))
        self.norm = nn.BatchNorm1d(2 * C)
        self.dropout = nn.Dropout(config.dropout)
        self.vector = nn.Linear(2 * C, config.size)

    def forward(self, codes_BL: Tensor) -> Tensor:
        """Return ``[B, F]`` for codes of :mod:`bgen.genes.sequences`, uint8."""
        codes_BL = F.pad(codes_BL, (0, -codes_BL.shape[1] % self.pool), value=UNKNOWN)
        known_BL = (codes_BL < UNKNOWN).flip(1).cummax(1).values.flip(1)  # up to the last known position
        valid_BP = known_BL.unflatten(1, (-1, self.pool)).any(-1)
        points = Points(valid_BL=None if bool(valid_BP.all()) else valid_BP)
        x_BPC = self.words(codes_BL)
        for block in self.blocks:
            x_BPC = points.blank(block(x_BPC, points))
        share_BP = valid_BP / valid_BP.sum(1, keepdim=True).clamp_min(1)
        mean_BC = (share_BP[:, None].to(x_BPC.dtype) @ x_BPC).squeeze(1)
        largest_BC = x_BPC.masked_fill(~valid_BP[..., None], -torch.inf).amax(1)
        largest_BC = torch.where(valid_BP.any(1, keepdim=True), largest_BC, 0.0)
        return self.vector(self.dropout(self.norm(torch.cat((mean_BC, largest_BC), dim=1))))
