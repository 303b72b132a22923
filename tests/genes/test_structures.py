"""Drugs by structure: what is alike in chemistry is alike by name, and what is no structure is told."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bgen.config.flow import MembersConfig
from bgen.errors import UserError
from bgen.genes.structures import BITS, read_structures
from bgen.genes.vectors import named_vectors

GENES = pd.DataFrame({"id": ["E1", "E2"], "symbol": ["AAA", "BBB"], "cells": 9})
DRUGS = """drug,smiles
aspirin,CC(=O)Oc1ccccc1C(=O)O
salicylic acid,O=C(O)c1ccccc1O
caffeine,Cn1cnc2c1c(=O)n(C)c(=O)n2C
theophylline,Cn1c(=O)c2[nH]cnc2n(C)c1=O
ethanol,CCO
"""


def test_drugs_of_one_family_are_alike(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    (tmp_path / "drugs.csv").write_text(DRUGS, encoding="utf-8")
    names, bits = read_structures(tmp_path / "drugs.csv")
    assert bits.shape == (5, BITS)
    assert set(bits.data) == {1.0}
    config = MembersConfig(structures=[tmp_path / "drugs.csv"], components=0)
    found = named_vectors(config, GENES, np.zeros((2, 0), np.float32))
    assert found.others == names
    rows = found.values[found.rows(["Aspirin", "salicylic acid", "caffeine", "theophylline"])].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    alike = rows @ rows.T
    assert alike[0, 1] > max(alike[0, 2], alike[0, 3], 0) + 0.2
    assert alike[2, 3] > max(alike[0, 2], alike[0, 3], 0) + 0.2
    assert found.rows(["AAA"]).tolist() == [-1]  # nothing is known of genes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("drug,smiles\nx,CCO\ny,C(C\n", "line 3: 'C(C' of 'y' is no SMILES"),
        ("drug,smiles\nx,\n", "line 2: '' of 'x' is no SMILES"),
        ("drug,smiles\nx,CCO\nx,CC\n", "'x' has two structures"),
        ("drug\nx\n", "it needs a heading, and rows of a name and its SMILES"),
        ("", "is no table of structures"),
        ("drug,smiles\nx," + "C" * 6000 + "\n", "is no SMILES"),
    ],
)
def test_what_is_no_structure_is_told(text: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rdkit")
    (tmp_path / "drugs.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as told:
        read_structures(tmp_path / "drugs.csv")
    assert said in str(told.value)
    assert "Parse Error" not in capfd.readouterr().err


def test_without_rdkit_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drugs.csv").write_text(DRUGS, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "rdkit.Chem", None)
    with pytest.raises(UserError, match=r"pip install 'bgen-flow\[drugs\]'"):
        read_structures(tmp_path / "drugs.csv")
    with pytest.raises(UserError, match="there is no file"):
        read_structures(tmp_path / "none.csv")
