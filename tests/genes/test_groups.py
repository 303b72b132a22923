"""Gene sets and regulators as groups of genes: which are chosen, how much they cover, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bgen.config.gene_set import GroupsConfig, NetworkConfig
from bgen.errors import UserError
from bgen.genes.groups import gene_set_groups, regulator_groups

GENES = pd.DataFrame({"id": [f"E{i}" for i in range(20)], "symbol": [f"G{i}" for i in range(20)], "cells": 1})


def gmt(path: Path, **sets: list[int]) -> Path:
    path.write_text("".join(f"{n}\t.\t" + "\t".join(f"g{i}" for i in of) + "\n" for n, of in sets.items()))
    return path


def test_the_sets_that_together_hold_the_most_genes_are_chosen_and_equal_ones_once(tmp_path: Path) -> None:
    file = gmt(
        tmp_path / "sets.gmt",
        large=list(range(10)),
        within=[1, 2, 3],
        again=[3, 2, 1],
        other=[8, 9, 10, 11, 12],
        tiny=[19],
        strange=[100, 101, 102],
    )
    found = gene_set_groups(GroupsConfig(file=file, tokens=3, at_least=3), GENES)
    assert found.names == ["large", "other", "within"]  # ten genes, three more, none more
    assert found.strength.shape == (20, 3)
    assert np.flatnonzero(found.strength[:, 1]).tolist() == [8, 9, 10, 11, 12]
    assert found.sentence == "3 of 6 gene sets of sets.gmt hold 13 of the 20 genes (65%)."
    upwards, downwards = found.relations
    assert np.argwhere(upwards).tolist() == [[2, 0]]  # "within" looks at "large"
    assert np.array_equal(downwards, upwards.T)
    told = gene_set_groups(GroupsConfig(file=file, tokens=3, at_least=3, hierarchy=True), GENES).sentence
    assert told.endswith("(65%); 1 lie within another.")


def test_genes_are_found_by_id_as_well_whatever_their_case(tmp_path: Path) -> None:
    (tmp_path / "sets.gmt").write_text("a\t.\te1\tE2\tG3\tG4\n")
    found = gene_set_groups(GroupsConfig(file=tmp_path / "sets.gmt", tokens=1, at_least=2), GENES)
    assert np.flatnonzero(found.strength[:, 0]).tolist() == [1, 2, 3, 4]


def test_shuffled_genes_have_the_sets_of_others(tmp_path: Path) -> None:
    file = gmt(tmp_path / "sets.gmt", a=[0, 1, 2, 3, 4], b=[3, 4, 5, 6])
    real, shuffled = (
        gene_set_groups(GroupsConfig(file=file, tokens=2, at_least=2, shuffled=control), GENES)
        for control in (False, True)
    )
    assert not np.array_equal(real.strength, shuffled.strength)
    assert sorted(map(tuple, real.strength)) == sorted(map(tuple, shuffled.strength))  # sizes and overlaps stay
    assert shuffled.sentence == real.sentence + " Control: each gene has the groups of another one."


def test_too_few_sets_and_too_few_genes_are_refused(tmp_path: Path) -> None:
    file = gmt(tmp_path / "sets.gmt", a=[0, 1, 2], b=[1, 2])
    with pytest.raises(UserError, match=r"groups\.tokens=3: only 2 groups of .* Set vae\.encoder\.groups\.tokens=2"):
        gene_set_groups(GroupsConfig(file=file, tokens=3, at_least=2), GENES)
    with pytest.raises(UserError, match=r"hold 3 of the 20 genes \(15%\)\. At least 20% are needed"):
        gene_set_groups(GroupsConfig(file=file, tokens=1, at_least=2), GENES)
    with pytest.raises(UserError, match=r"vae\.encoder\.groups\.file is not given"):
        gene_set_groups(GroupsConfig(), GENES)


EDGES = (
    "TF,target,mor\n"
    "G0,G5,1\nG0,G6,-0.5\nG0,G1,1\n"
    "G1,G7,-2\nG1,G8,2\n"
    "ABSENT,G9,1\nabsent,G10,1\nABSENT,G11,0\nG19,G3,1\n"
)


def test_regulators_need_not_be_genes_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "net.csv").write_text(EDGES)
    found = regulator_groups(NetworkConfig(file=tmp_path / "net.csv", tokens=3, at_least=2, relations=True), GENES)
    assert found.names == ["G0", "ABSENT", "G1"]
    assert found.strength[[5, 6, 1], 0].tolist() == [1.0, 0.5, 1.0]  # sizes over the largest
    assert found.sign[[5, 6, 1, 7, 8], [0, 0, 0, 2, 2]].tolist() == [1, -1, 1, -1, 1]
    assert np.flatnonzero(found.strength[:, 1]).tolist() == [9, 10]  # not the edge of weight zero
    regulated, regulates = found.relations
    assert np.argwhere(regulated).tolist() == [[2, 0]]  # G1 is regulated by G0
    assert np.array_equal(regulates, regulated.T)
    assert found.sentence == ("3 of 4 regulators of net.csv hold 7 of the 20 genes (35%); 1 edges join two of them.")


def test_a_network_that_says_little_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.csv").write_text(EDGES)
    with pytest.raises(UserError, match="At least 20% are needed"):
        regulator_groups(NetworkConfig(file=tmp_path / "net.csv", tokens=1, at_least=2), GENES)
    with pytest.raises(UserError, match=r"network\.tokens=4: only 3 groups"):
        regulator_groups(NetworkConfig(file=tmp_path / "net.csv", tokens=4, at_least=2), GENES)
    with pytest.raises(UserError, match=r"vae\.encoder\.network\.file is not given"):
        regulator_groups(NetworkConfig(), GENES)
