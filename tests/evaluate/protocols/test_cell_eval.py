"""cell-eval's own figures, where the library is installed: the model between a copy of the controls and the ceiling."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.errors import UserError
from bgen.evaluate.protocols.cell_eval import average, cell_eval_figures, figures_table
from bgen.evaluate.protocols.perturbation import CEILING, CONTROL_COPY, MODEL, HeldOut


def screen() -> list[HeldOut]:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(60, 2.0))

    def cells(effect: np.ndarray, n: int) -> sp.csr_matrix:
        return sp.csr_matrix(rng.poisson(1000 * shares * np.exp(effect), (n, 60)).astype(np.float32))

    control, made = cells(np.zeros(60), 200), []
    for number in range(4):
        effect = np.where(rng.random(60) < 0.2, rng.normal(0, 1, 60), 0)
        none = np.array([], np.int64)
        made.append(HeldOut(f"p{number}", cells(effect, 100), control, cells(0.8 * effect, 120), {}, none))
    return made


@pytest.mark.filterwarnings("ignore")
def test_the_library_puts_a_good_model_above_a_copy_of_the_controls() -> None:
    pytest.importorskip("cell_eval")
    figures = cell_eval_figures(screen())
    model, copy, best = figures[MODEL], figures[CONTROL_COPY], figures[CEILING]
    for key in ("pearson_delta", "discrimination_score_l1", "de_direction_match"):
        assert model[key] is not None
        assert (copy[key] or 0) < model[key] <= 1
        assert best[key] is not None
        assert best[key] > 0.8
    assert model["mae"] < copy["mae"]  # type: ignore[operator]


def test_averages_miss_what_one_part_misses() -> None:
    first, second = ({MODEL: {"mae": value, "mse": other}} for value, other in ((1.0, None), (3.0, 2.0)))
    assert average([first, second]) == {MODEL: {"mae": 2.0, "mse": None}}
    assert figures_table(average([first, second])).row_count == 2


@pytest.mark.skipif(importlib.util.find_spec("cell_eval") is not None, reason="cell-eval is installed")
def test_without_the_library_it_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match=r"pip install 'bgen-flow\[perturb\]'"):
        cell_eval_figures(screen())
