"""``bgen bench dna``: what is compared, what is said of it, and genes that come into a gene table by their vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bgen.bench.sequences.dna import CONTROL, KMERS, bench_dna, equal_sizes
from bgen.config.sequences import SequenceConfig
from bgen.errors import UserError
from bgen.genes.vectors import read_vectors
from bgen.models.sequences.regression import SequenceRegression
from data_tools.simulate.promoters import simulate_promoters


def compare(bgen: Any, out: Path, *given: str) -> tuple[str, Any]:
    small = ["bench", "dna", "--simulated", "--genes", "150", "--seeds", "1", "--epochs", "1", "--only", "convolution"]
    done = bgen(*small, *given, "--out", out)
    assert done.code == 0, done
    return done.out, json.loads((out / "dna.json").read_text(encoding="utf-8"))


def test_the_command_compares_simulated_promoters(bgen: Any, tmp_path: Path) -> None:
    out, told = compare(bgen, tmp_path / "out")
    assert "convolution, shuffled: no difference (against convolution)." in out  # one split tells nothing
    assert set(told) == {"sequences"}
    rows = {KMERS, KMERS + CONTROL, "convolution", "convolution" + CONTROL}
    assert set(told["sequences"]["runs"]) == rows
    assert told["sequences"]["against"]["convolution"] == KMERS
    assert told["sequences"]["held_out"] == 30
    # stopped before the last row, it goes on with it, and changes nothing of the others
    kept = tmp_path / "out" / "rows.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines()
    kept.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    _, again = compare(bgen, tmp_path / "out", "--resume")
    after = kept.read_text(encoding="utf-8").splitlines()
    assert (len(lines), after[:-1]) == (5, lines[:-1])
    for figures in (again["sequences"]["runs"], told["sequences"]["runs"]):
        del figures["convolution" + CONTROL][0]["ms"]
    assert again == told


@pytest.mark.slow
def test_unseen_genes_come_through_a_gene_table(bgen: Any, tmp_path: Path) -> None:
    out, told = compare(bgen, tmp_path / "out", "--vae-steps", "2")
    assert "The same through a gene table" in out
    rows = told["gene_table"]["runs"]
    assert set(rows) == {KMERS, "convolution", "convolution" + CONTROL}
    assert set(rows[KMERS][0]) == {"component 1", "all deviations"}
    assert not (tmp_path / "out" / "run").exists()


def test_vectors_are_written_for_all_sequences(bgen: Any, tmp_path: Path) -> None:
    made = simulate_promoters(genes=150, length=40, cells=80, seed=0)
    made.cells[:, :120].copy().write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "promoters.fa").write_text(made.fasta, encoding="utf-8")
    given = ["vectors", tmp_path / "promoters.fa", tmp_path / "cells.h5ad", "--out", tmp_path / "vectors.csv"]
    done = bgen(*given, "--epochs", "1", "--size", "5", "--mixer", "convolution")
    assert done.code == 0, done
    assert "120 of 120 genes (100%) have one of the 150" in " ".join(done.err.split())
    names, vectors = read_vectors(tmp_path / "vectors.csv")
    assert (len(names), vectors.shape[1]) == (150, 5)
    assert bgen(*given, "--mixer", "hiena").code == 2
    assert "Did you mean 'hyena'" in bgen(*given[:-1], tmp_path / "other.csv", "--mixer", "hiena").err
    (tmp_path / "promoters.fa").write_text(made.fasta.replace("gene0", "other0"), encoding="utf-8")
    foreign = bgen(*given[:-1], tmp_path / "other.csv")
    assert foreign.code == 2
    assert "0 genes have a sequence" in foreign.err


def test_networks_have_about_as_many_parameters() -> None:
    sizes = equal_sizes(["hyena", "mamba2", "attention", "convolution"], SequenceConfig(), 200)
    numbers = [sum(p.numel() for p in SequenceRegression(one, 200, 5).parameters()) for one in sizes.values()]
    assert max(numbers) < 1.3 * min(numbers)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Name a FASTA file"):
        bench_dna(None, None, tmp_path / "a", by=["cell_type"], say=print)
    with pytest.raises(UserError, match="no row 'hiena'"):
        bench_dna(None, None, tmp_path / "b", by=["cell_type"], only=["hiena"], say=print)
