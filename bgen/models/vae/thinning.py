"""Binomial thinning: a cell as it would have looked, had it been sequenced less deeply.

In training the encoder sees thinned counts while the decoder still explains the full ones. So the latent state depends
less on depth, and the encoder does not memorise single counts.

Axes: B cells, NNZ non-zero counts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.models.vae.thinning_cpu import thin_small
from bgen.nn.cpu.threads import parts
from bgen.nn.gpu import thinning as on_gpu
from bgen.nn.gpu.draws import uniform
from bgen.nn.gpu.kernels import usable
from bgen.nn.gpu.thinning import EXACT
from bgen.nn.random import Stream, at, row_state, unit_from_bits

KEPT = (0.3, 1.0)
"""Range of the fraction of counts that a thinned cell keeps."""


def thin(batch: CellBatch, share: float) -> Tensor:
    """Thin a ``share`` of the cells; return counts float32 ``[NNZ]`` (zeros included), a pure function of the keys.

    A cell chosen with probability ``share`` keeps each of its counts with probability ``p``, uniform in ``KEPT``.
    """
    if usable(batch.counts):
        return on_gpu.thin(batch.indptr, batch.indices, batch.counts, batch.keys, _kept(*_shares(batch, share)))
    if batch.counts.device.type != "cpu":
        return thin_plainly(batch, share)
    chosen, keep = _shares(batch, share)
    state = row_state(batch.keys, Stream.THIN_COUNT)
    done, large, large_rows = thin_small(
        batch.indptr.numpy(),
        batch.indices.numpy(),
        batch.counts.numpy(),
        state.numpy().view(np.uint64),
        chosen.numpy(),
        keep.numpy(),
        EXACT,
        parts(len(batch), len(batch.counts)),
    )
    left = torch.from_numpy(large), torch.from_numpy(large_rows)
    return _thin_entries(batch, torch.from_numpy(done), *left, state, keep)


def _shares(batch: CellBatch, share: float) -> tuple[Tensor, Tensor]:
    """Which cells are thinned, bool ``[B]``, and the share of their counts that they would keep, ``[B]``."""
    choice = uniform(batch.keys, Stream.THIN_CELL, 2)
    return choice[:, 0] < share, KEPT[0] + (KEPT[1] - KEPT[0]) * choice[:, 1]


def _kept(chosen: Tensor, keep: Tensor) -> Tensor:
    """The share of its counts that each cell keeps, ``[B]``; 1: it is not thinned."""
    return torch.where(chosen, keep, 1.0)


def thin_plainly(batch: CellBatch, share: float) -> Tensor:
    """Thin as :func:`thin` does, in plain torch: on the same device to the bit what the kernel gives.

    It never asks which entries are thinned: on a GPU the host would have to wait for the answer.
    """
    rows, keep = batch.rows, _kept(*_shares(batch, share))
    state = row_state(batch.keys, Stream.THIN_COUNT)
    kept = keep.index_select(0, rows)
    lost = torch.where(kept < 1, 1 - kept, 0.5)  # any share will do where the result is not used
    drawn = binomial(batch.counts, lost, unit_from_bits(at(state.index_select(0, rows), batch.indices.long())))
    return torch.where(kept < 1, batch.counts - drawn, batch.counts)


def _thin_entries(
    batch: CellBatch, counts: Tensor, entries: Tensor, rows: Tensor, state: Tensor, keep: Tensor
) -> Tensor:
    """``counts [NNZ]`` with those at ``entries``, which lie in ``rows``, thinned."""
    if len(entries) == 0:
        return counts
    chosen = batch.counts.index_select(0, entries)
    # The position in the key's sequence is the gene, so a draw does not depend on which other genes are present.
    bits = at(state.index_select(0, rows), batch.indices.index_select(0, entries).long())
    thinned = chosen - binomial(chosen, 1 - keep.index_select(0, rows), unit_from_bits(bits))
    return counts.index_copy(0, entries, thinned)


def binomial(n: Tensor, p: Tensor, u: Tensor) -> Tensor:
    """Draw binomial numbers of ``n`` trials with probability ``p`` (0 < p < 1), by inverting uniform ``u``; all
    ``[NNZ]``.

    Exact for n <= 32, by walking up ``P(k + 1) = P(k) * (n - k) / (k + 1) * p / (1 - p)``; most counts are 1 or 2, so
    few entries walk far. Above, the rounded normal quantile, clipped to 0..n.
    """
    # Product and sum are rounded by themselves, and inverses are numbers: so the bits are the same on every device.
    normal = torch.special.ndtri(u).mul_((n * p * (1 - p)).sqrt_()).add_(n * p).round_()
    result = torch.minimum(normal.clamp_min_(0), n)

    probability = torch.exp(n * torch.log1p(-p))
    small = n <= EXACT
    walk = _walk if n.device.type == "cpu" else _walk_together
    return walk(n, p / (1 - p), u, probability, small, result.masked_fill_(small, 0))


def _walk(n: Tensor, odds: Tensor, u: Tensor, probability: Tensor, small: Tensor, result: Tensor) -> Tensor:
    """Walk up from P(0) = ``probability`` where ``small``, and write into ``result``; those that are there leave."""
    entry = (small & (u > probability)).nonzero().squeeze(1)
    n, odds, u, probability = (values.index_select(0, entry) for values in (n, odds, u, probability))
    cumulative = probability
    k = 0
    while len(entry):
        probability = probability * ((n - k) * (1 / (k + 1)) * odds)
        k += 1
        cumulative = cumulative + probability
        going = (u > cumulative) & (n > k)
        result[entry[~going]] = k
        keep = going.nonzero().squeeze(1)
        entry = entry.index_select(0, keep)
        n, odds, u, probability, cumulative = (
            values.index_select(0, keep) for values in (n, odds, u, probability, cumulative)
        )
    return result


def _walk_together(n: Tensor, odds: Tensor, u: Tensor, probability: Tensor, small: Tensor, result: Tensor) -> Tensor:
    """As :func:`_walk`, to the bit, without asking who is there: all walk as far as the longest may."""
    cumulative = probability
    result += small & (u > cumulative)
    for k in range(EXACT - 1):
        probability = probability * ((n - k) * (1 / (k + 1)) * odds)
        cumulative = cumulative + probability
        result += small & (u > cumulative) & (n > k + 1)
    return result
