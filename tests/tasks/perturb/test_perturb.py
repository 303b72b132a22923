"""The average predicted cell, and which control cells share one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from bgen.tasks.perturb.perturb import anchor, contexts_of
from bgen.tasks.perturb.screen import LEAST_CONTROLS


def test_the_average_cell_becomes_the_control_average_with_the_effect() -> None:
    """Whatever the decoder's average is; a gene that is off gets what it got in training, not a multiple of nothing."""
    rng = np.random.default_rng(0)
    rate = np.array([0.0, 2.0, 5.0, 40.0, 200.0])
    control = sp.csr_matrix(rng.poisson(rate, (400, 5)).astype(np.float32))
    library = np.asarray(control.sum(1)).ravel()
    measured = np.asarray(control.multiply(1e4 / library[:, None]).mean(0)).ravel()
    decoded = rng.dirichlet(np.full(5, 5.0))
    effect = np.array([4.0, 0.5, -0.5, 0.0, -9.0])
    logits = np.log(decoded) + anchor(decoded, control, effect).numpy()
    expected = np.expm1(np.maximum(np.log1p(measured) + effect, 0))
    np.testing.assert_allclose(1e4 * np.exp(logits), expected, rtol=0.02, atol=0.1)
    assert 1e4 * np.exp(logits[0]) == pytest.approx(np.expm1(4), rel=0.02)


def model(*strata: str) -> Any:
    return SimpleNamespace(saved=SimpleNamespace(about=SimpleNamespace(perturbation=SimpleNamespace(strata=strata))))


def test_cells_of_a_context_share_an_average_and_few_cells_that_of_all() -> None:
    few, many = LEAST_CONTROLS - 1, LEAST_CONTROLS
    types = np.repeat(["a", "b", "c"], [many, few, many + 5])
    adata = AnnData(
        np.ones((len(types), 1), np.float32), obs=pd.DataFrame({"type": types}, index=map(str, range(len(types))))
    )
    (whole,) = contexts_of(model(), adata)
    assert len(whole[0]) == len(whole[1]) == len(types)
    assert len(contexts_of(model("type", "donor"), adata)) == 1  # the data do not say who the donors are
    found = contexts_of(model("type"), adata)
    assert [set(types[rows]) for rows, _ in found] == [{"a"}, {"c"}, {"b"}]
    assert [len(among) for _, among in found] == [many, many + 5, len(types)]
    assert sorted(np.concatenate([rows for rows, _ in found])) == list(range(len(types)))
