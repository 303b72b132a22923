"""Pictures from Python: on Axes that are given or made, of what is asked for, and errors that say what is missing."""

from __future__ import annotations

import re

import anndata
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import bgen
from bgen.errors import UserError
from bgen.evaluate.metrics.registry import METRICS
from bgen.evaluate.protocols.scores import Estimate, Score, Scores
from bgen.evaluate.reports.distribution import strip
from data_tools.simulate.simulate import simulate


@pytest.fixture(autouse=True)
def _no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("agg")


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return simulate("tiny", seed=0)


def test_losses_are_drawn_where_asked() -> None:
    history = pd.DataFrame({"train/loss": [3.0, 2.0], "valid/loss": [np.nan, 2.5]}, index=[1, 2])
    axis = Figure().subplots()
    assert bgen.plot.training(history, axis) is axis
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert lines == {"train": [[1, 3], [2, 2]], "held out": [[2, 2.5]]}
    with pytest.raises(UserError, match="neither train/loss nor valid/loss"):
        bgen.plot.training(history.iloc[:, :0])


def test_the_strongest_changes_are_named(cells: anndata.AnnData) -> None:
    control, perturbed = cells[:200].copy(), cells[200:400].copy()
    counts = perturbed.X.tolil()
    counts[:, 7] = 40
    perturbed.X = counts.tocsr()
    axis = bgen.plot.effect(control, perturbed, top=1)
    assert [text.get_text() for text in axis.texts] == [cells.var_names[7]]
    table = bgen.plot.changes(control, perturbed)
    assert table["p"].idxmin() == cells.var_names[7]
    logs = [np.log1p(1e4 * c.X.toarray() / c.X.sum(1)) for c in (control, perturbed)]
    from scipy.stats import ttest_ind

    straight = ttest_ind(*(np.asarray(log)[:, 3] for log in logs), equal_var=False)
    assert table["p"].iloc[3] == pytest.approx(straight.pvalue, rel=1e-3)
    pd.testing.assert_frame_equal(bgen.plot.changes(control, perturbed[:, ::-1]), table)
    other = perturbed.copy()
    other.var_names = [f"other{name}" for name in other.var_names]
    with pytest.raises(UserError, match="share 0 names of genes"):
        bgen.plot.effect(control, other)


def test_real_and_generated_cells_stand_side_by_side(cells: anndata.AnnData) -> None:
    pair = Figure().subplots(1, 2)
    drawn = bgen.plot.cells(cells[:150], cells[150:300], cell_type="cell_type", axes=pair)
    assert [axis.get_title() for axis in drawn] == ["real cells", "generated cells"]
    assert all(len(axis.collections[-1].get_offsets()) for axis in pair[:1])
    assert {text.get_text() for text in pair[1].get_legend().get_texts()} >= set(cells.obs["cell_type"].iloc[:150])
    with pytest.raises(UserError, match="Two Axes"):
        bgen.plot.cells(cells[:150], cells[150:300], axes=[pair[0]])


def test_types_have_the_colours_that_scanpy_kept(cells: anndata.AnnData) -> None:
    real = cells[:60].copy()
    real.obs["cell_type"] = real.obs["cell_type"].astype("category")
    names = list(real.obs["cell_type"].cat.categories)
    real.uns["cell_type_colors"] = [f"#{place}{place}0000" for place in range(1, len(names) + 1)]
    _, right = bgen.plot.cells(real, cells[60:120], cell_type="cell_type", axes=Figure().subplots(1, 2))
    handles, shown = right.get_legend_handles_labels()
    drawn = {name: mpl.colors.to_hex(one.get_facecolor()[0]) for name, one in zip(shown, handles, strict=True)}
    assert drawn == dict(zip(names, real.uns["cell_type_colors"], strict=True))


def test_the_variance_of_each_gene_is_over_its_mean(cells: anndata.AnnData) -> None:
    axis = bgen.plot.variance(cells[:200], cells[200:400], Figure().subplots())
    counts = cells[200:400].X.toarray()
    mean, spread = counts.mean(0), counts.var(0, ddof=1)
    often = mean * 200 >= 20
    drawn = np.sort(axis.collections[1].get_offsets()[:, 0])
    np.testing.assert_allclose(drawn, np.sort(mean[often & (spread > 0)]), rtol=1e-5)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("mean count of a gene", "variance / mean")
    assert {"real", "generated", "Poisson"} <= {line.get_label() for line in axis.get_lines()}


def test_a_course_has_the_mean_at_each_time(cells: anndata.AnnData) -> None:
    genes = list(cells.var_names[:2])
    axis = bgen.plot.course(cells, genes, time="time")
    at = np.sort(pd.to_numeric(cells.obs["time"]).unique())
    logs = np.log1p(1e4 * cells.X.toarray() / cells.X.sum(1))
    for line, column in zip(axis.get_lines(), range(2), strict=True):
        means = [np.asarray(logs)[(cells.obs["time"] == time).to_numpy(), column].mean() for time in at]
        np.testing.assert_allclose(line.get_xdata(), at)
        np.testing.assert_allclose(line.get_ydata(), means, rtol=1e-4)
    with pytest.raises(UserError, match="Did you mean 'time'"):
        bgen.plot.course(cells, genes, time="tme")
    with pytest.raises(UserError, match="There is no gene 'x'"):
        bgen.plot.course(cells, ["x"])


def test_scores_stand_between_baseline_and_real_cells() -> None:
    metric = next(metric for metric in METRICS.values() if metric.better == "lower")
    one = Score(metric, Estimate((2.0, 2.0)), Estimate((3.0, 3.0)), Estimate((1.0, 1.0)))
    axis = bgen.plot.scores(Scores("distribution-v2", 10, 2, {}, (one,)))
    at = {line.get_label(): line.get_xdata()[0] for line in axis.get_lines()}
    assert at == {"model": 0.5, "baseline": 0.0, "real cells": 1.0}
    drawn = strip(one)  # the same in a report: 94 pixels from 8 on
    assert [float(x) for x in re.findall(r'cx="([\d.]+)"', drawn)] == [8 + 94 * at["baseline"], 8 + 94 * at["model"]]
    assert float(re.findall(r'rect x="([\d.]+)"', drawn)[0]) + 1.5 == 8 + 94 * at["real cells"]
