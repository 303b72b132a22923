"""Numbers that were asked for, on real cells: those of other cells of that time pass, and shuffled times do not."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from anndata import AnnData

from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.protocols.conditions import LIBRARY
from bgen.evaluate.protocols.distribution import evaluate
from bgen.evaluate.protocols.scores import Scores

FEW, TIME = choose_metrics("energy"), "embryo_time"


@pytest.fixture(scope="module")
def embryo(real_data: Path) -> list[AnnData]:
    """Training cells, test cells and cells to pass off as generated ones, of a worm's embryo over time."""
    cells = anndata.read_h5ad(real_data / "packer_worm_embryo_1805x10000.h5ad")
    cells = cells[:, np.asarray((cells.X > 0).sum(0)).ravel() > 90].copy()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    cells.obs[LIBRARY] = np.asarray(cells.X.sum(1)).ravel()
    return [cells[rows].copy() for rows in np.split(order, [cells.n_obs // 2, 3 * cells.n_obs // 4])]


def score(train: AnnData, test: AnnData, other: AnnData) -> Scores:
    return evaluate(train, test, other, conditions=[TIME, LIBRARY], metrics=FEW, seeds=2)


def test_cells_of_the_time_that_was_asked_for_pass(embryo: list[AnnData]) -> None:
    scores = score(*embryo)
    told = {key: scores[f"rank_{key}"] for key in (TIME, LIBRARY)}
    assert told[TIME].model.mean > 0.5
    assert told[LIBRARY].model.mean > 0.999
    for figure in told.values():
        assert figure.judgement is not None
        assert not figure.judgement.differs


def test_shuffled_times_and_sizes_are_seen(embryo: list[AnnData]) -> None:
    train, test, other = embryo
    wrong = other.copy()
    wrong.obs[TIME] = np.random.default_rng(1).permutation(wrong.obs[TIME].to_numpy())
    wrong.X = wrong.X[np.random.default_rng(2).permutation(wrong.n_obs)]  # and so the sizes that were asked for
    scores = score(train, test, wrong)
    for key in (TIME, LIBRARY):
        told = scores[f"rank_{key}"].judgement
        assert told is not None
        assert told.differs, key
    assert f"Asked for {TIME}, not wholly delivered" in " ".join(scores.asked)
