"""What is known by name: vectors of several sources side by side, for genes and for anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from bgen.config.flow import MembersConfig
from bgen.errors import UserError
from bgen.genes.expression import coexpression_rows, log_cp10k
from bgen.genes.vectors import named_vectors, read_vectors

GENES = pd.DataFrame({"id": [f"E{i}" for i in range(4)], "symbol": ["AAA", "BBB", "CCC", "DDD"], "cells": 9})


def test_sources_stand_side_by_side_and_names_beyond_the_genes_follow(tmp_path: Path) -> None:
    (tmp_path / "drugs.csv").write_text("name,x,y\naspirin,1,0\nBBB,0,1\nE2,1,1\n", encoding="utf-8")
    (tmp_path / "sets.gmt").write_text("one\t.\tAAA\tBBB\ntwo\t.\tCCC\tXXX\n", encoding="utf-8")
    (tmp_path / "net.csv").write_text("source,target,weight\nAAA,BBB,1\nAAA,CCC,-2\nBBB,DDD,1\n", encoding="utf-8")
    config = MembersConfig(
        vectors=[tmp_path / "drugs.csv"], sets=tmp_path / "sets.gmt", network=tmp_path / "net.csv", components=2
    )
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    found = named_vectors(config, GENES, rows)
    assert found.others == ["aspirin", "XXX"]
    assert np.array_equal(found.values[:4, :2], rows)
    assert not found.values[4:, :2].any()  # nothing is known of how drugs vary with genes
    assert found.network is not None
    assert np.array_equal(found.values[:, -len(found.network) :].any(1), [True, True, False, False, False, False])
    assert found.rows(["aspirin", "ASPIRIN", "bbb", "BBB", "E2", "nobody"]).tolist() == [4, 4, 1, 1, 2, -1]


def test_genes_of_sets_are_found_whatever_their_case(tmp_path: Path) -> None:
    (tmp_path / "sets.gmt").write_text("one\t.\tAAA\tBBB\ntwo\t.\tCCC\tDDD\n", encoding="utf-8")
    mouse = GENES.assign(symbol=["Aaa", "Bbb", "Ccc", "Ddd"])
    found = named_vectors(MembersConfig(sets=tmp_path / "sets.gmt", components=0), mouse, np.zeros((4, 0), np.float32))
    assert found.others == []
    assert found.rows(["Aaa", "AAA"]).tolist() == [0, 0]
    assert np.allclose(found.values[0], found.values[1], atol=1e-5)
    assert not np.allclose(found.values[0], found.values[2], atol=1e-2)


def test_of_sources_that_say_nothing_nothing_is_known() -> None:
    found = named_vectors(MembersConfig(components=0), GENES, np.zeros((4, 0), np.float32))
    assert found.values.shape == (4, 0)
    assert found.rows(["AAA"]).tolist() == [-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,x\na,1\nb,\n", "the vector of 'b' has gaps"),
        ("name,x\na,1\na,2\n", "'a' has two vectors"),
        ("name,x\na,red\n", "no table of vectors"),
        ("name\na\n", "1 vectors of 0 numbers"),
    ],
)
def test_a_bad_file_is_told(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_vectors(path)
    with pytest.raises(UserError, match="there is no file"):
        read_vectors(tmp_path / "none.csv")


def test_genes_that_vary_together_have_alike_rows() -> None:
    rng = np.random.default_rng(0)
    drive = rng.normal(size=(400, 2))
    rate = np.exp(1.5 + np.stack([drive[:, 0], drive[:, 0], drive[:, 1], drive[:, 1], 0 * drive[:, 0]], 1))
    counts = sp.csr_matrix(np.concatenate([rng.poisson(rate), np.zeros((400, 1))], 1).astype(np.float32))
    rows = coexpression_rows(counts, 3)
    assert rows.shape == (6, 3)
    assert not rows[5].any()
    norm = rows[:, :2] / np.maximum(np.linalg.norm(rows[:, :2], axis=1, keepdims=True), 1e-9)
    assert min(norm[0] @ norm[1], norm[2] @ norm[3]) > 0.9
    assert abs(norm[0] @ norm[2]) < 0.5
    dense = log_cp10k(counts).toarray().astype(float)
    centred = dense - dense.mean(0)
    scores = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
    expected = np.corrcoef(dense[:, :5].T, scores.T)[:5, 5:]
    np.testing.assert_allclose(np.abs(rows[:5] / np.sqrt(3)), np.abs(expected), atol=1e-3)
    assert np.array_equal(rows, coexpression_rows(counts, 3))
    few = coexpression_rows(counts[:5], 3)  # more genes than cells
    dense = dense[:5] - dense[:5].mean(0)
    scores = dense @ np.linalg.svd(dense, full_matrices=False)[2][:3].T
    expected = np.corrcoef(dense[:, :5].T, scores.T)[:5, 5:]
    np.testing.assert_allclose(np.abs(few[:5] / np.sqrt(3)), np.abs(expected), atol=1e-3)
