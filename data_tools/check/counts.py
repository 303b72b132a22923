"""Whether a matrix holds counts: one exact pass over all its values, and what follows from it (checks C01 to C06).

Axes: N cells, M columns (genes of the file).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.order.groups import parts
from data_tools.cells.mapped import room
from data_tools.cells.texts import ranges
from data_tools.check.scan_values import FRACTIONAL, mix, scan_values, sum_expm1
from data_tools.inputs.source import Source

NEAR_INTEGER = 1e-3
"""Distance from an integer up to which a value is a count with numerical noise (C02)."""

PARTS = ("spliced", "unspliced", "ambiguous")
"""Layers of RNA velocity: counts, but of a part of each cell's molecules; never taken unless they are named."""

CAP = 1 << 16
"""Counts from here on share one bin of the histogram."""

Verdict = Literal["counts", "near counts", "not finite", "negative", "scaled", "fractional"]


@dataclass
class MatrixStatistics:
    """What one pass over a matrix found.

    Attributes
    ----------
    nonzero, fractional, negative, not_finite
        Numbers of values other than 0; not integers; below 0; NaN or infinite.
    off_by
        Largest distance of a value from its nearest integer.
    minimum, maximum, total, squares
        Smallest and largest stored value, sum and sum of squares of the finite ones.
    first_bad
        ``(cell, column, value)`` of the first five negative or not finite values.
    library, detected
        float64, int64 ``[N]``: sum and number of the non-zero values of each cell.
    expm1_library
        float64 ``[N]``: sum of exp(value) - 1 of each cell, where values allow.
    fingerprint
        uint64 ``[N, 2]``: hash of each cell's (gene, value) pairs, independent of their order.
    column_cells
        int64 ``[M]``: cells in which a column is not 0.
    histogram
        int64 ``[CAP + 1]``: how often each count occurs.
    """

    nonzero: int = 0
    fractional: int = 0
    negative: int = 0
    not_finite: int = 0
    off_by: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    first_bad: list[tuple[int, int, float]] = field(default_factory=list)
    library: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    detected: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    expm1_library: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    fingerprint: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    column_cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(CAP + 1, np.int64))

    @property
    def verdict(self) -> Verdict:
        """What the values are."""
        if self.not_finite:
            return "not finite"
        if self.negative:
            # Scaled values are centred: many are negative and their mean is small beside their spread.
            spread = np.sqrt(self.squares / self.nonzero)
            centred = self.fractional and abs(self.total / self.nonzero) < 0.1 * spread
            return "scaled" if centred and self.negative > 0.2 * self.nonzero else "negative"
        if self.off_by > NEAR_INTEGER:
            return "fractional"
        return "near counts" if self.fractional else "counts"

    @property
    def corrected(self) -> bool:
        """Whether the values are counts that SoupX or EM made fractional: many are integers, some are large."""
        return self.verdict == "fractional" and self.fractional < 0.8 * self.nonzero and self.maximum > 20

    @property
    def usable(self) -> bool:
        """Whether these are counts, at most with numerical noise."""
        return self.verdict in ("counts", "near counts")


def scan(
    source: Source,
    matrix: str,
    *,
    columns: NDArray[np.bool_] | None = None,
    gene_keys: NDArray[np.uint64] | None = None,
) -> MatrixStatistics:
    """Read a matrix once, all of it, and return its statistics.

    Parameters
    ----------
    columns
        bool ``[M]``: columns that count; default all.
    gene_keys
        uint64 ``[M]``: a hash of each column's gene, so that equal cells of files with other gene orders are found.
    """
    n_cells, n_columns = source.matrices[matrix].shape
    found = MatrixStatistics(
        library=room(n_cells, np.float64),
        detected=room(n_cells, np.int64),
        expm1_library=np.zeros(n_cells),  # pages that are never written take no memory
        fingerprint=room((n_cells, 2), np.uint64),
        column_cells=np.zeros(n_columns, np.int64),
    )
    keys = gene_keys if gene_keys is not None else mix(np.arange(n_columns, dtype=np.uint64))
    wanted = np.ones(n_columns, bool) if columns is None else columns
    counts, figures = np.zeros(4, np.int64), np.zeros(5)
    bad = np.empty((5, 2), np.int64)
    for start, chunk in source.iterate(matrix):
        rows = slice(start, start + chunk.shape[0])
        n_bad = scan_values(
            chunk.indptr,
            chunk.indices,
            chunk.data,
            wanted,
            keys,
            counts,
            figures,
            found.histogram,
            found.column_cells,
            found.library[rows],
            found.detected[rows],
            found.fingerprint[rows],
            bad[: 5 - len(found.first_bad)],
        )
        for row, at in bad[:n_bad].tolist():
            found.first_bad.append((start + row, int(chunk.indices[at]), float(chunk.data[at])))
        if counts[FRACTIONAL]:
            sum_expm1(chunk.indptr, chunk.indices, chunk.data, wanted, found.expm1_library[rows])
    found.nonzero, found.fractional, found.negative, found.not_finite = counts.tolist()
    found.off_by, found.minimum, found.maximum, found.total, found.squares = figures.tolist()
    return found


def is_part(name: str) -> bool:
    """Whether a matrix holds a part of each cell's molecules only."""
    return name.removeprefix("layers/") in PARTS


def advice(elsewhere: Sequence[str]) -> str:
    """Say what to do, given the matrices that hold counts in the order in which they are proposed."""
    if not elsewhere:
        return ""
    if not is_part(elsewhere[0]):
        return f"Counts found in {' and '.join(elsewhere)}: rerun with --counts {elsewhere[0]}"
    parts = [name for part in PARTS for name in elsewhere if name.removeprefix("layers/") == part]
    whole = " + ".join(f"adata.layers['{name.removeprefix('layers/')}']" for name in parts)
    return (
        f"Counts of a part of each cell's molecules (RNA velocity) found in {' and '.join(parts)}. Add the parts up"
        f" (adata.layers['counts'] = {whole}) and take --counts layers/counts, or take one part: --counts {parts[0]}"
    )


def gene_keys(ids: pd.Index) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each gene id, the same in every file."""
    return pd.util.hash_array(ids.to_numpy(object), categorize=False)


def looks_like(found: MatrixStatistics) -> str:
    """Say what fractional values look like, as a sentence, or return an empty string."""
    filled = found.library > 0
    sums, expm1 = found.library[filled], found.expm1_library[filled]
    if found.maximum <= 30 and _constant(expm1):
        return f"It looks log1p-normalised (row sums of expm1 = {np.median(expm1):,.0f})."
    if _constant(sums):
        return f"It looks normalised to a fixed total (row sums = {np.median(sums):,.6g}), not log-transformed."
    if found.corrected:
        return "Part of it are integers: it looks like counts corrected for ambient RNA (SoupX) or shared out by EM."
    if found.maximum <= 20:
        return "It looks log-transformed."
    return ""


def _constant(sums: NDArray[np.float64]) -> bool:
    return len(sums) > 1 and float(np.std(sums)) < 0.01 * float(np.mean(sums))


def describe(found: MatrixStatistics, where: str, cells: Callable[[int], str], genes: pd.Index) -> tuple[str, str]:
    """Return the check's id and its sentence, without the fix, for a matrix that is not :attr:`usable`."""
    if found.verdict == "scaled":
        share = found.negative / found.nonzero
        mean = found.total / found.nonzero
        return "C04", (
            f"{where} is scaled, not counts: {share:.0%} of the non-zero values are negative and their mean is "
            f"{mean:.2g} (z-scores)."
        )
    if found.verdict in ("not finite", "negative"):
        what = []
        if found.not_finite:
            what.append(f"{found.not_finite:,} NaN or infinite")
        if found.negative:
            what.append(f"{found.negative:,} negative")
        first = "; ".join(f"cell {cells(c)}, gene {genes[g]}: {v:.6g}" for c, g, v in found.first_bad)
        return "C03", f"{where} is not counts: {' and '.join(what)} value(s). The first: {first}."
    share = found.fractional / found.nonzero
    percent = f"{share:.0%}" if 0.005 < share < 0.995 or share == 1 else f"{share:.3%}"
    return "C01", (
        f"{where} is not counts: {percent} of the non-zero values are fractional, max {found.maximum:.6g}. "
        f"{looks_like(found)}".strip()
    )


def saturated(found: MatrixStatistics) -> str:
    """Say how integer counts seem clipped or binarised (C05), or return an empty string."""
    if found.maximum <= 1:
        return (
            "no value is above 1: the counts look binarised. Dispersion cannot be learned from them; use the raw file."
        )
    top = int(min(np.rint(found.maximum), CAP))
    at_top, next_to_it = int(found.histogram[top]), int(found.histogram[top - 1])
    # Counts thin out towards the maximum; a pile on it is what clipping leaves.
    if top < CAP and at_top >= 10 and at_top > 2 * next_to_it:
        return f"{at_top:,} values equal the maximum, {top}: the counts look clipped there. Use the raw file."
    return ""


def duplicate_groups(fingerprints: list[NDArray[np.uint64]], nonempty: list[NDArray[np.bool_]]) -> Iterator[list[int]]:
    """Yield the numbers (over all files) of cells with the same non-zero counts, one list per group of two or more.

    Cells are compared by 128-bit hashes: among 10^9 cells the chance of one false pair is below 10^-20.
    """
    # nearly all cells are told apart by half of their hash; only the others are looked at further
    lengths = [len(prints) for prints in fingerprints]
    edges = np.concatenate([[0], np.cumsum(lengths)])
    numbers, halves = room(edges[-1], np.int64), room(edges[-1], np.uint64)
    filled = 0
    for before, prints, there in zip(edges.tolist(), fingerprints, nonempty, strict=False):
        for part in parts(len(prints)):
            rows = part.start + np.flatnonzero(there[part])
            numbers[filled : filled + len(rows)] = before + rows
            halves[filled : filled + len(rows)] = prints[rows, 0]
            filled += len(rows)
    for some in ranges(filled, lambda part: halves[:filled][part]):
        half = halves[some]
        order = np.argsort(half, kind="stable")
        same = half[order][1:] == half[order][:-1]
        often = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
        if not len(often):
            continue
        number = numbers[some[order[often]]]
        del half, order, same
        file = np.searchsorted(edges, number, side="right") - 1
        found = np.empty((len(number), 2), np.uint64)
        for which in np.unique(file).tolist():
            inside = file == which
            found[inside] = fingerprints[which][number[inside] - edges[which]]
        order = np.lexsort((number, found[:, 1], found[:, 0]))
        same = (found[order][1:] == found[order][:-1]).all(1)
        ends = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
        for first, last in zip(ends[::2], ends[1::2], strict=True):
            yield number[order[first : last + 1]].tolist()
