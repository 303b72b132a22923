"""FASTA files, well-formed and not; k-mers; sequences whose positions are in another order."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bgen.errors import UserError
from bgen.genes import sequences
from bgen.genes.sequences import UNKNOWN, Sequences, kmer_shares, read_fasta, shuffled


def written(tmp_path: Path, text: bytes) -> Path:
    path = tmp_path / "genes.fa"
    path.write_bytes(text)
    return path


def test_names_are_first_words_and_letters_become_codes(tmp_path: Path) -> None:
    text = b">A some gene\r\nACGT\r\nacgu\r\n\r\n>B\nRN-\n>A again\nTTTT\n"
    found = read_fasta(written(tmp_path, text))
    assert found.names == ["A", "B"]
    assert found.codes.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [UNKNOWN] * 8]
    assert found.further == 1


def test_promoters_of_the_promoter_database_are_named_by_their_gene(tmp_path: Path) -> None:
    heading = b">FP003908 wrt-3_1             :+U  EU:NC; range  -200 to   200.\nAC\n"
    assert read_fasta(written(tmp_path, heading)).names == ["wrt-3"]
    assert read_fasta(written(tmp_path, b">FP1 my_1 gene\nAC\n")).names == ["FP1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "holds no sequence"),
        (b"ACGT\n", "line 1: a FASTA file begins with"),
        (b"\x89PNG\x00\x01\n", "line 1: a FASTA file begins with"),
        (b">A\nAC\n>\nGT\n", "line 3: a heading needs a name"),
        (b">A\n>B\nAC\n", "line 1: 'A' has no sequence"),
        (b">A\nAC\n>B\n", "line 3: 'B' has no sequence"),
        (b">A\nMKVL*\n", "line 2: a sequence has letters of DNA"),
        (b">A\nAC\xffGT\n", "line 2: a sequence has letters of DNA"),
        (b">A\n" + b"A" * 60 + b"\n" + b"A" * 60 + b"\n", "line 1: 'A' has more than 100 positions"),
        (b">A\n" + b"A" * 5000, "a line of more than 100 letters"),
        (b">A\nAAAA\n>B\nA\n>C\nA\n", "more than 10 in all"),
    ],
)
def test_a_bad_file_is_told(text: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "LONGEST", 100)
    monkeypatch.setattr(sequences, "MOST", 200 if b"A" * 60 in text else 10)
    with pytest.raises(UserError, match=words):
        read_fasta(written(tmp_path, text))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none.fa", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_fasta(path)


def test_genes_find_their_sequence_by_id_or_symbol() -> None:
    found = Sequences(["bb", "E0", "nobody"], np.zeros((3, 2), np.uint8))
    genes = pd.DataFrame({"id": ["E0", "E1", "E2"], "symbol": ["aa", "bb", ""], "cells": 0})
    rows = found.rows(genes)
    assert rows.tolist() == [1, 0, -1]
    assert found.sentence(rows).startswith("Sequences: 2 of 3 genes (67%) have one of the 3 of up to 2 positions.")


def test_shares_of_words_are_those_of_a_loop() -> None:
    codes = np.random.default_rng(0).integers(0, 5, (6, 30)).astype(np.uint8)
    codes[5] = UNKNOWN
    found = kmer_shares(codes, 2)
    expected = np.zeros((6, 16))
    for row, one in enumerate(codes):
        for first, second in pairwise(one):
            if first < 4 and second < 4:
                expected[row, 4 * first + second] += 1
    np.testing.assert_allclose(found, expected / np.maximum(expected.sum(1, keepdims=True), 1))
    assert kmer_shares(codes[:, :1], 2).shape == (6, 16)  # shorter than a word


def test_shuffling_keeps_bases_and_ends_but_not_order() -> None:
    codes = np.random.default_rng(0).integers(0, 5, (8, 200)).astype(np.uint8)
    codes[:, 150:] = UNKNOWN
    codes[:, 149] = 0
    moved = shuffled(codes, 0)
    np.testing.assert_array_equal(np.sort(moved, axis=1), np.sort(codes, axis=1))
    assert (moved[:, 150:] == UNKNOWN).all()
    assert (moved[:, :150] == codes[:, :150]).mean() < 0.4
    orders = {tuple(np.argsort(row[:150], kind="stable")) for row in moved}
    assert len(orders) == 8  # each its own
