"""Genes: duplicates, versions, dates, naming systems, organisms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_tools.check.genes import Genes, latin, resolve_genes, resolve_organism, systems_of

ENSEMBL = [f"ENSG{i:011d}" for i in range(20)]
SYMBOLS = [f"ABC{chr(65 + i)}{i}" for i in range(20)]


def _var(index: list[str], **columns: list) -> pd.DataFrame:
    return pd.DataFrame(columns, index=pd.Index(index))


def _messages(genes: Genes, level: str) -> str:
    return " ".join(f"{f.id}: {f.message}" for f in genes.findings if f.level == level)


def test_clean_ids_have_no_findings() -> None:
    genes = resolve_genes(_var(ENSEMBL, feature_name=SYMBOLS))
    assert genes.findings == []
    assert genes.system == "Ensembl"
    assert list(genes.symbols) == SYMBOLS
    assert np.array_equal(genes.gene_map, np.arange(20))


def test_gene_column_and_the_symbols_left_in_the_index() -> None:
    genes = resolve_genes(_var(SYMBOLS, gene_ids=ENSEMBL), "gene_ids")
    assert list(genes.ids) == ENSEMBL
    assert list(genes.symbols) == SYMBOLS
    wrong = resolve_genes(_var(SYMBOLS, gene_ids=ENSEMBL), "gene_id")
    assert "Did you mean 'gene_ids'" in _messages(wrong, "error")


def test_duplicates_are_refused_or_summed() -> None:
    var = _var(["A1", "B1", "A1", "C1"], gene_ids=ENSEMBL[:4])
    refused = resolve_genes(var)
    message = _messages(refused, "error")
    assert "G01: 1 gene ids occur more than once: 'A1'" in message
    assert "--merge-duplicates sum" in message
    assert "--gene-column gene_ids" in message
    summed = resolve_genes(var, merge_duplicates="sum")
    assert _messages(summed, "error") == ""
    assert list(summed.ids) == ["A1", "B1", "C1"]
    assert summed.gene_map.tolist() == [0, 1, 0, 2]


def test_versions_are_cut_and_may_make_duplicates() -> None:
    genes = resolve_genes(_var([f"{name}.{i + 1}" for i, name in enumerate(ENSEMBL)]))
    assert list(genes.ids) == ENSEMBL
    assert "20 Ensembl ids carry a version" in _messages(genes, "fix")
    double = resolve_genes(_var(["ENSG00000000001.1", "ENSG00000000001.2", "ENSG00000182378.14_PAR_Y"]))
    assert "occur more than once: 'ENSG00000000001'" in _messages(double, "error")
    assert "ENSG00000182378_PAR_Y" in double.ids
    clones = resolve_genes(_var(["AL627309.1", "RP11-206L10.2", "GAPDH"]))
    assert clones.findings == []


@pytest.mark.parametrize("date", ["1-Mar", "Sep-02", "2021-09-02", "1-Dec"])
def test_dates_are_found(date: str) -> None:
    assert f"became dates in a spreadsheet: '{date}'" in _messages(resolve_genes(_var([*SYMBOLS, date])), "error")


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(20)],
        [str(i) for i in range(5, 60_000, 3000)],
        [f"{i}.0" for i in range(20)],
        [f"V{i}" for i in range(1, 21)],
        [f"gene_{i}" for i in range(20)],
    ],
)
def test_counters_are_no_names(names: list[str]) -> None:
    genes = resolve_genes(_var(names))
    assert "the genes have no names" in _messages(genes, "error")
    assert "--accept-unnamed-genes" in _messages(genes, "error")
    assert genes.system == "none"
    accepted = resolve_genes(_var(names), accept_unnamed=True)
    assert _messages(accepted, "error") == ""
    assert "no names" in _messages(accepted, "warning")


def test_a_column_with_names_is_proposed_for_counters() -> None:
    genes = resolve_genes(_var([str(i) for i in range(20)], gene_symbol=SYMBOLS))
    assert "var['gene_symbol'] has unique symbols: --gene-column gene_symbol" in _messages(genes, "error")


def test_simulated_names_and_entrez_ids_pass() -> None:
    assert resolve_genes(_var([f"G{i:04d}" for i in range(1, 21)]), synthetic=True).findings == []
    entrez = resolve_genes(_var(["7157", "1956", "100287102", "672"]))
    assert "taken as Entrez" in _messages(entrez, "warning")


def test_mixed_systems_spike_ins_and_other_features_are_told() -> None:
    assert "70% symbol, 30% Ensembl" in _messages(resolve_genes(_var(ENSEMBL[:6] + SYMBOLS[:14])), "warning")
    assert "1 ERCC spike-ins" in _messages(resolve_genes(_var([*SYMBOLS, "ERCC-00002"])), "warning")
    kinds = ["Gene Expression"] * 19 + ["Antibody Capture"]
    genes = resolve_genes(_var(SYMBOLS, feature_types=kinds))
    assert "left out: 1 'Antibody Capture'" in _messages(genes, "fix")
    assert genes.gene_map.tolist() == [*range(19), -1]


def test_missing_ids_are_an_error() -> None:
    genes = resolve_genes(_var(SYMBOLS, gene_ids=[*ENSEMBL[:18], None, ""]), "gene_ids")
    assert "2 genes have no id" in _messages(genes, "error")
    assert len(genes.ids) == 18


def test_systems() -> None:
    names = ["ENSMUSG00000000001.4", "WBGene00001960", "FBgn0000008", "ERCC-00002", "17", "V17", "TP53"]
    expected = ["Ensembl", "WormBase", "FlyBase", "spike-in", "number", "counter", "symbol"]
    assert list(systems_of(pd.Index(names))) == expected


@pytest.mark.parametrize("name", ["human", "Homo sapiens", "NCBITaxon:9606", "9606 "])
def test_latin(name: str) -> None:
    assert latin(name) == "Homo sapiens"


@pytest.mark.parametrize(
    ("ids", "given", "uns", "obs", "organism", "words"),
    [
        (ENSEMBL, None, {}, {}, "Homo sapiens", ""),
        (ENSEMBL, None, {"organism": "human"}, {}, "Homo sapiens", ""),
        (ENSEMBL, None, {"organism": "mouse"}, {}, "Mus musculus", "the file says Mus musculus, but the gene ids"),
        (ENSEMBL, "mouse", {}, {}, "Mus musculus", "--organism says Mus musculus"),
        (ENSEMBL[:10] + [f"ENSMUSG{i:011d}" for i in range(10)], None, {}, {}, "unknown", "of several organisms"),
        (SYMBOLS, None, {}, {"organism": ["human", "mouse"]}, "unknown", "cells are of several organisms"),
        (["Gapdh", "Actb", "0610007L01Rik"], None, {}, {}, "Mus musculus", "Taken as Mus musculus"),
        (SYMBOLS, None, {}, {}, "Homo sapiens", "Taken as Homo sapiens"),
        (["x.1", "y-2"], None, {}, {}, "unknown", "Say it with --organism"),
        (["x.1", "y-2"], "Volvox carteri", {}, {}, "Volvox carteri", ""),
    ],
)
def test_organism(ids: list[str], given: str | None, uns: dict, obs: dict, organism: str, words: str) -> None:
    genes = resolve_genes(_var(ids))
    found, findings = resolve_organism(given, uns, pd.DataFrame(obs), genes, "file")
    said = " ".join(f.message for f in findings)
    assert words in said
    assert bool(words) == bool(findings)
    if "several" not in said:
        assert found == organism
