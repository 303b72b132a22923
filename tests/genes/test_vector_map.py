"""Vectors of a model's genes, and of further ones that are made in the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bgen.config.gene_set import VectorsConfig
from bgen.errors import UserError
from bgen.genes.vector_map import fit_vectors

G = 40
GENES = pd.DataFrame({"id": [f"E{i}" for i in range(G)], "symbol": [f"G{i}" for i in range(G)], "cells": 1})
NAMES = [f"G{i}" for i in range(10, 60)]
"""Names of a file of vectors: thirty genes of the model, and twenty others."""


def write_vectors(path: Path, names: list[str], numbers: int = 6, seed: int = 0) -> Path:
    rows = np.random.default_rng(seed).standard_normal((60, numbers)) + 3
    pd.DataFrame(rows[[int(name[1:]) for name in names]], index=names).to_csv(path)
    return path


def write_sets(path: Path, genes: int, copies: int = 1, prefix: str = "G") -> Path:
    """Twelve sets of ``genes`` genes; gene ``i`` is in sets that its number says."""
    lines = []
    for number in range(12):
        members = [f"{prefix}{i}" for i in range(genes) if (i * (number + 2)) % 7 < 3]
        lines.append("\t".join([f"SET{number}", "", *members]))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("size", [4, 6, 9])
def test_further_genes_get_what_they_would_have_had_in_training(size: int, tmp_path: Path) -> None:
    config = VectorsConfig(files=[write_vectors(tmp_path / "v.csv", NAMES)], size=size)
    vectors, made = fit_vectors(config, GENES)
    assert vectors.shape == (G, size)
    assert made.others == tuple(f"G{i}" for i in range(40, 60))
    known = made.look_up(GENES, vectors, ["g12", "E12", "G45", "nothing"])
    assert np.array_equal(known[0], vectors[12])
    assert np.array_equal(known[1], vectors[12])
    assert known[2].any()
    assert not known[3].any()
    assert not vectors[:10].any()
    again, said = made.read(GENES, vectors, config.files, None)
    np.testing.assert_allclose(again["G12"], vectors[12], atol=1e-5)
    np.testing.assert_allclose(again["G45"], known[2], atol=5e-3)  # kept in half precision
    assert said == ["v.csv: 50 vectors, read like v.csv; of 50 names the model has a vector, too (median cosine 1.00)."]


def test_sets_of_another_file_are_those_of_the_same_name(tmp_path: Path) -> None:
    config = VectorsConfig(sets=write_sets(tmp_path / "s.gmt", 50), size=5)
    vectors, made = fit_vectors(config, GENES)
    found, said = made.read(GENES, vectors, [], write_sets(tmp_path / "mouse.gmt", 50, prefix="Mus"))
    np.testing.assert_allclose(found["MUS12"], vectors[12], atol=1e-5)
    np.testing.assert_allclose(found["MUS45"], made.look_up(GENES, vectors, ["G45"])[0], atol=5e-3)
    assert said == ["mouse.gmt: 12 of the 12 sets of s.gmt, 50 genes."]
    (tmp_path / "other.gmt").write_text("SET0\t\tX\nOTHER\t\tX\n")
    with pytest.raises(UserError, match=r"has 1 of the 12 gene sets that the model was trained with \(s\.gmt\)"):
        made.read(GENES, vectors, [], tmp_path / "other.gmt")
    with pytest.raises(UserError, match="trained with vectors of gene sets alone"):
        made.read(GENES, vectors, [write_vectors(tmp_path / "v.csv", NAMES)], None)


def test_what_several_sources_say_is_added_up(tmp_path: Path) -> None:
    files = [write_vectors(tmp_path / "a.csv", NAMES), write_vectors(tmp_path / "b.csv", NAMES, numbers=4, seed=1)]
    vectors, made = fit_vectors(VectorsConfig(files=files, sets=write_sets(tmp_path / "s.gmt", 50), size=7), GENES)
    found, said = made.read(GENES, vectors, files, tmp_path / "s.gmt")
    np.testing.assert_allclose(found["G12"], vectors[12], atol=1e-5)
    assert len(said) == 3
    of_one, _ = made.read(GENES, vectors, files[:1], None)
    assert not np.allclose(of_one["G12"], vectors[12], atol=0.1)


def test_more_singular_vectors_of_sets_are_kept_if_more_are_asked_for(tmp_path: Path) -> None:
    lines = ["\t".join([f"S{n}", "", *[f"G{i}" for i in range(G) if (7 * i + n * n) % 11 < 3]]) for n in range(60)]
    lines += [f"OWN{i}\t\tG{i}" for i in range(G)]
    (tmp_path / "s.gmt").write_text("\n".join(lines) + "\n")
    many, few = (fit_vectors(VectorsConfig(sets=tmp_path / "s.gmt", size=size), GENES)[0] for size in (36, 32))
    assert np.linalg.matrix_rank(many) == 36
    assert np.linalg.matrix_rank(few) == 32


def test_vectors_of_another_kind_are_refused(tmp_path: Path) -> None:
    config = VectorsConfig(files=[write_vectors(tmp_path / "v.csv", NAMES)], size=4)
    vectors, made = fit_vectors(config, GENES)
    with pytest.raises(UserError, match="holds vectors of 5 numbers, and the model was trained with vectors of 6"):
        made.read(GENES, vectors, [write_vectors(tmp_path / "five.csv", NAMES, numbers=5)], None)
    with pytest.raises(UserError, match=r"its vectors of 50 names are not those .* \(median cosine -?0\.\d\d"):
        made.read(GENES, vectors, [write_vectors(tmp_path / "other.csv", NAMES, seed=3)], None)
    with pytest.raises(UserError, match="not with gene sets"):
        made.read(GENES, vectors, [], write_sets(tmp_path / "s.gmt", 50))
    pd.DataFrame(np.ones((2, 6)), index=["X1", "X2"]).to_csv(tmp_path / "new.csv")
    assert "its kind is not checked" in made.read(GENES, vectors, [tmp_path / "new.csv"], None)[1][0]
