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
from bgen.nn.random import Stream, at, row_state, uniform, unit_from_bits

KEPT = (0.3, 1.0)
"""Range of the fraction of counts that a thinned cell keeps."""

_EXACT = 32
"""Counts up to here are thinned by the exact binomial, larger ones by its normal approximation."""


def thin(batch: CellBatch, share: float) -> Tensor:
    """Thin a ``share`` of the cells; return counts float32 ``[NNZ]`` (zeros included), a pure function of the keys.

    A cell chosen with probability ``share`` keeps each of its counts with probability ``p``, uniform in ``KEPT``.
    """
    choice = uniform(batch.keys, Stream.THIN_CELL, 2)
    chosen = choice[:, 0] < share
    keep = KEPT[0] + (KEPT[1] - KEPT[0]) * choice[:, 1]
    state = row_state(batch.keys, Stream.THIN_COUNT)
    if batch.counts.device.type != "cpu":
        return _thin_all(batch, state, torch.where(chosen, keep, 1.0))
    done, large, large_rows = thin_small(
        batch.indptr.numpy(),
        batch.indices.numpy(),
        batch.counts.numpy(),
        state.numpy().view(np.uint64),
        chosen.numpy(),
        keep.numpy(),
        _EXACT,
        parts(len(batch), len(batch.counts)),
    )
    left = torch.from_numpy(large), torch.from_numpy(large_rows)
    return _thin_entries(batch, torch.from_numpy(done), *left, state, keep)


def _thin_all(batch: CellBatch, state: Tensor, keep: Tensor) -> Tensor:
    """All counts ``[NNZ]`` thinned; a cell whose ``keep [B]`` is 1 keeps them as they are.

    It never asks which entries those are: on a GPU the host would have to wait for the answer.
    """
    rows = batch.rows
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
    normal = torch.special.ndtri(u).mul_((n * p * (1 - p)).sqrt_()).addcmul_(n, p).round_()
    result = torch.minimum(normal.clamp_min_(0), n)

    probability = torch.exp(n * torch.log1p(-p))
    small = n <= _EXACT
    walk = _walk if n.device.type == "cpu" else _walk_together
    return walk(n, p / (1 - p), u, probability, small, result.masked_fill_(small, 0))


def _walk(n: Tensor, odds: Tensor, u: Tensor, probability: Tensor, small: Tensor, result: Tensor) -> Tensor:
    """Walk up from P(0) = ``probability`` where ``small``, and write into ``result``; those that are there leave."""
    entry = (small & (u > probability)).nonzero().squeeze(1)
    n, odds, u, probability = (values.index_select(0, entry) for values in (n, odds, u, probability))
    cumulative = probability
    k = 0
    while len(entry):
        probability = probability * ((n - k) / (k + 1) * odds)
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
    for k in range(_EXACT - 1):
        probability = probability * ((n - k) / (k + 1) * odds)
        cumulative = cumulative + probability
        result += small & (u > cumulative) & (n > k + 1)
    return result
