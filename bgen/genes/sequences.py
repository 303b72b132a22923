"""Sequences of genes from a FASTA file: one to a gene, such as promoters, and shares of their k-mers.

A sequence is read from 5' to 3' of its gene. Its name is the first word of its heading; headings of the Eukaryotic
Promoter Database (``FP003908 wrt-3_1 :+U EU:NC; ...``) name the gene in the second. Of several sequences of a name, the
first is taken.

Axes: G sequences, L positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.genes.table import find_genes

Codes = NDArray[np.uint8]

BASES = "ACGT"
UNKNOWN = len(BASES)
"""Code of a position that is not known (N, or any letter for several bases), or lies beyond the end."""

LONGEST = 20_000
"""Positions of a sequence, at most."""
MOST = 400_000_000
"""Positions of all sequences, each as long as the longest, at most: they are held in memory, a byte each."""
MOST_WORD = 8
"""Length of k-mers, at most."""

_PROMOTER = re.compile(r"^\S+\s+(\S+)_\d+\s+:[+-][A-Z]\s")
_AMBIGUOUS = "NRYSWKMBDHVX-."
_FOREIGN = 255


def _table() -> Codes:
    codes = np.full(256, _FOREIGN, np.uint8)
    for letters, numbers in ((BASES, range(4)), ("U", (3,)), (_AMBIGUOUS, [UNKNOWN] * len(_AMBIGUOUS))):
        for letter, number in zip(letters, numbers, strict=True):
            codes[[ord(letter), ord(letter.lower())]] = number
    return codes


_CODES = _table()


@dataclass(frozen=True)
class Sequences:
    """Sequences by name.

    Attributes
    ----------
    names
        The G names, each once.
    codes
        uint8 ``[G, L]``: 0 to 3 for A, C, G, T; :data:`UNKNOWN` for others, and beyond the end of a shorter sequence.
    further
        Sequences of the file that were left out: their name had come before.
    """

    names: list[str]
    codes: Codes
    further: int = 0

    def rows(self, genes: pd.DataFrame) -> I64:
        """Return for each gene of a table (``id``, ``symbol``) the row of its sequence, or -1: by id, else by symbol.

        A gene that two names fit has the sequence that comes first.
        """
        places = find_genes(genes, self.names)
        rows = np.full(len(genes), -1, np.int64)
        found = np.flatnonzero(places >= 0)[::-1]
        rows[places[found]] = found
        return rows

    def sentence(self, rows: I64) -> str:
        """Say how many genes have a sequence, where ``rows`` are those of all genes."""
        left = f"; {self.further:,} further sequences of names that had come before are not used" * (self.further > 0)
        share = (rows >= 0).mean()
        return (
            f"Sequences: {(rows >= 0).sum():,} of {len(rows):,} genes ({share:.0%}) have one of the {len(self.names):,}"
            f" of up to {self.codes.shape[1]:,} positions{left}."
        )


def read_fasta(path: Path) -> Sequences:
    """Read a FASTA file of DNA.

    Raises
    ------
    UserError
        If it cannot be read, holds none, a line is no sequence, or the sequences are too long.
    """
    found: dict[str, Codes] = {}
    further = longest = 0
    for name, codes in _records(path):
        longest = max(longest, len(codes))
        further += name in found
        found.setdefault(name, codes)
        if len(found) * longest > MOST:
            raise UserError(
                f"{path}: {len(found):,} sequences of up to {longest:,} positions are more than {MOST:,} in all. Cut"
                " them to the region of interest, such as promoters, and leave out genes that are not needed."
            )
    if not found:
        raise UserError(f"{path} holds no sequence: a FASTA file has headings, '>' and a name, each above a sequence.")
    codes = np.full((len(found), longest), UNKNOWN, np.uint8)
    for row, one in enumerate(found.values()):
        codes[row, : len(one)] = one
    return Sequences(list(found), codes, further)


def _records(path: Path) -> Iterator[tuple[str, Codes]]:
    """Yield the name and the codes of each sequence of a file."""
    name, parts, length, begun = "", list[Codes](), 0, 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(chain(_bounded(lines, path), [b">"]), 1):
                if not line.startswith(b">"):
                    if not name and line.strip():
                        raise UserError(f"{path}, line {number}: a FASTA file begins with '>' and a name.")
                    codes = _CODES[np.frombuffer(b"".join(line.split()), np.uint8)]
                    if (codes == _FOREIGN).any():
                        raise UserError(f"{path}, line {number}: a sequence has letters of DNA alone (ACGT, N).")
                    parts.append(codes)
                    length += len(codes)
                    if length > LONGEST:
                        raise UserError(
                            f"{path}, line {begun}: '{name[:80]}' has more than {LONGEST:,} positions. Cut sequences to"
                            " the region of interest, such as promoters."
                        )
                    continue
                if name and not length:
                    raise UserError(f"{path}, line {begun}: '{name[:80]}' has no sequence.")
                if name:
                    yield name, np.concatenate(parts)
                name, parts, length, begun = _name(line), [], 0, number
                if not name and line != b">":
                    raise UserError(f"{path}, line {number}: a heading needs a name after '>'.")
    except OSError as error:
        raise UserError(f"The sequences {path} cannot be read: {error.strerror}.") from None


def _bounded(lines: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Yield lines, of which none is longer than sequences may be: a file of another kind may be one line."""
    read = lines.readline  # type: ignore[attr-defined]
    while line := read(LONGEST + 4096):
        if len(line) == LONGEST + 4096:
            raise UserError(f"{path} is no FASTA file of genes: it has a line of more than {LONGEST:,} letters.")
        yield line


def _name(heading: bytes) -> str:
    text = heading[1:].decode("utf-8", errors="replace").strip()
    promoter = _PROMOTER.match(text)
    return promoter[1] if promoter else (text.split() or [""])[0]


def kmer_shares(codes: Codes, k: int) -> NDArray[np.float64]:
    """Return the share of each word of k known bases among those of a sequence, ``[G, 4^k]``; none: zeros."""
    assert 1 <= k <= MOST_WORD
    G, L = codes.shape
    places = max(L - k + 1, 0)
    word, known = np.zeros((G, places), np.int64), np.ones((G, places), bool)
    for step in range(k):
        letter = codes[:, step : step + places]
        word, known = 4 * word + letter, known & (letter < UNKNOWN)
    rows = np.nonzero(known)[0]
    counts = np.bincount(rows * 4**k + word[known], minlength=G * 4**k).reshape(G, 4**k)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def shuffled(codes: Codes, seed: int) -> Codes:
    """Return each sequence with its positions in another order, those beyond its last known base where they were."""
    keys = np.random.default_rng([seed, 61]).random(codes.shape)
    keys[np.cumsum(codes[:, ::-1] < UNKNOWN, axis=1)[:, ::-1] == 0] = 1.0  # beyond the last
    return np.take_along_axis(codes, np.argsort(keys, axis=1, kind="stable"), axis=1)
