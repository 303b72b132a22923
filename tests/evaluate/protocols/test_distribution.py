from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from bgen.errors import UserError
from bgen.evaluate.metrics.registry import choose_metrics
from bgen.evaluate.protocols.distribution import METRICS, baseline_cells, evaluate, fit_reference, measure
from bgen.evaluate.protocols.scores import Scores

Draw = Callable[[int, int], AnnData]
FEW = choose_metrics("energy", "precision")


def test_real_cells_are_at_the_ceiling_and_the_baseline_is_not(draw: Draw) -> None:
    train, test, real = draw(1, 900), draw(2, 300), draw(3, 600)
    scores = evaluate(train, test, real, cell_type="kind", seeds=2)
    assert scores.cells == 300
    assert [s.metric.key for s in scores.scores[: len(METRICS)]] == [metric.key for metric in METRICS]
    assert [s.metric.key for s in scores.scores if s.judgement is None or s.judgement.differs] == []
    assert scores.notes == ()
    good = ("better than the baseline", "at the ceiling")
    assert sum(score.verdict in good for score in scores.scores) >= 3
    assert scores.copied is not None
    assert not scores.copied.found
    drawn = baseline_cells(train, real, cell_type="kind", seed=9)
    few = choose_metrics("w2", "mmd2", "energy", "correlation", "nn_accuracy")
    easy = evaluate(train, test, drawn, cell_type="kind", seeds=2, metrics=few)
    for key in ("w2", "mmd2", "energy", "correlation"):
        assert easy[key].verdict not in good, key
    assert easy["nn_accuracy"].model.mean > scores["nn_accuracy"].model.mean
    assert scores["correlation"].baseline.mean > 1.1 * scores["correlation"].ceiling.mean
    assert abs(scores["nn_accuracy"].ceiling.mean - 0.5) < 0.05


def test_each_defect_is_seen_by_the_measure_for_it(draw: Draw) -> None:
    train, test, real = draw(1, 800), draw(2, 300), draw(3, 300)
    bigger, shuffled = real.copy(), real.copy()
    bigger.X = real.X * 3
    shuffled.X = sparse.csr_matrix(np.random.default_rng(0).permuted(real.X.toarray(), axis=0))
    one_kind = draw(3, 900)[draw(3, 900).obs["kind"] == "T cell"].copy()
    worse = "worse than the baseline"

    def scored(cells: AnnData, *keys: str) -> Scores:
        return evaluate(train, test, cells, cell_type="kind", seeds=2, metrics=choose_metrics(*keys))

    scores = scored(bigger, "library_ks", "mean_rmse")
    assert (scores["library_ks"].verdict, scores["mean_rmse"].verdict) == (worse, worse)
    scores = scored(shuffled, "correlation", "w2", "mean_rmse")
    assert (scores["correlation"].verdict, scores["w2"].verdict) == (worse, worse)
    assert not scores["mean_rmse"].judgement.differs  # type: ignore[union-attr]
    scores = scored(one_kind, "energy")
    assert scores["energy"].verdict == worse
    assert "too few of some types" in scores.notes[0]


def test_same_input_same_scores_and_other_sizes_are_subsampled(draw: Draw) -> None:
    train, test, real = draw(1, 300), draw(2, 150), draw(3, 200)
    calls: list[tuple[int, int]] = []
    scores = evaluate(
        *(train, test, real), seeds=2, max_cells=100, metrics=FEW, on_progress=lambda a, b: calls.append((a, b))
    )
    assert scores.as_json() == evaluate(train, test, real, seeds=2, max_cells=100, metrics=FEW).as_json()
    assert scores.cells == 100
    assert "rough" in scores.notes[0]
    assert calls == [(i, 9) for i in range(1, 10)]
    assert evaluate(train, test, real, seeds=2, metrics=FEW).cells == 150  # half of train, all of test


def test_types_are_matched_where_both_are_known(draw: Draw) -> None:
    """A pool of other proportions, rich enough in each type, scores like one of the right proportions."""
    train, test, pool = draw(1, 800), draw(2, 250), draw(3, 1500)
    skewed = pool[np.argsort(pool.obs["kind"].to_numpy(), kind="stable")][:900].copy()  # B cells first: 2/3 of them
    known = evaluate(train, test, skewed, cell_type="kind", metrics=FEW)
    unknown = skewed.copy()
    del unknown.obs["kind"]
    told = known["energy"].judgement
    assert told is not None
    assert not told.differs
    assert (
        evaluate(train, test, unknown, cell_type="kind", metrics=FEW)["energy"].model.mean
        > known["energy"].model.mean + 0.05
    )


def test_ceiling_is_not_of_the_cells_that_fitted_the_space(pbmc: AnnData) -> None:
    """With many genes and few cells, cells that the components were fitted on lie further out than new ones."""
    cells = pbmc[np.random.default_rng(1).permutation(pbmc.n_obs)[:900]].copy()
    train, test, fresh = (cells[rows].copy() for rows in np.split(np.arange(900), [450, 650]))
    fitted, real = (sparse.csr_matrix(part.X) for part in (train[:200], test))
    leaked = measure(fit_reference(fitted), real, fitted)
    ceiling = evaluate(train, test, fresh, seeds=2, metrics=choose_metrics("w2", "precision"))
    assert leaked["precision"] < 0.6 < 0.8 < ceiling["precision"].ceiling.mean
    assert leaked["w2"] > 1.2 * ceiling["w2"].ceiling.mean


def test_baseline_cells(draw: Draw) -> None:
    train, like = draw(1, 300), draw(2, 100)
    drawn = baseline_cells(train, like, cell_type="kind", seed=1)
    assert list(drawn.obs["kind"]) == list(like.obs["kind"])
    assert drawn.var_names.equals(train.var_names)
    assert drawn.X.dtype == np.int32
    assert (drawn.X != baseline_cells(train, like, cell_type="kind", seed=1).X).nnz == 0
    assert baseline_cells(train, like).obs.shape[1] == 0


def test_a_type_that_train_lacks_is_noted(draw: Draw) -> None:
    train, test = draw(1, 300), draw(2, 100)
    test.obs["kind"] = np.where(np.arange(100) < 20, "new", test.obs["kind"].astype(str))
    scores = evaluate(train, test, draw(3, 100), cell_type="kind", seeds=2, metrics=FEW)
    assert any("does not hold" in note and "new" in note for note in scores.notes)


def test_wrong_genes_and_values_are_reported_together(draw: Draw) -> None:
    train, test, generated = draw(1, 60), draw(2, 60), draw(3, 60)
    generated.X = generated.X * 0.5
    message = error(train, test[:, 5:].copy(), generated, cell_type="knid")
    assert "test: lacks 5 of 60 genes (g0, g1, g2, ...), compared with train. Restrict all sets to the 55" in message
    assert re.search(r"generated: X holds [\d,]+ values that are not counts, such as 0.5", message)
    assert "train: no column 'knid' in obs. Did you mean 'kind'?" in message


def test_genes_in_another_order(draw: Draw) -> None:
    message = error(draw(1, 60), draw(2, 60), draw(3, 60)[:, ::-1].copy())
    assert "position 0: 'g59' instead of 'g0'" in message
    assert "generated = generated[:, train.var_names]" in message


def test_no_gene_shared_or_twice_the_same(draw: Draw) -> None:
    other = draw(3, 60)
    other.var_names = [f"ENSG{i}" for i in range(60)]
    assert "No gene is shared" in error(draw(1, 60), draw(2, 60), other)
    twice = draw(3, 60)
    twice.var_names = ["g0", "g0", *[f"g{i}" for i in range(2, 60)]]
    assert "1 gene ids occur more than once (g0)" in error(draw(1, 60), draw(2, 60), twice)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, 1.5])
def test_values_that_are_not_counts(draw: Draw, bad: float) -> None:
    generated = draw(3, 60)
    generated.X.data[7] = bad
    assert "generated: X holds 1 values that are not counts" in error(draw(1, 60), draw(2, 60), generated)


def test_too_few_cells_or_seeds(draw: Draw) -> None:
    assert "there are 60, 5 and 30" in error(draw(1, 60), draw(2, 60), draw(3, 5))
    with pytest.raises(UserError, match="seeds must be at least 2"):
        evaluate(draw(1, 60), draw(2, 60), draw(3, 60), seeds=1, metrics=FEW)


def test_input_is_left_alone_and_dense_counts_are_taken(draw: Draw) -> None:
    train, test, generated = draw(1, 100), draw(2, 60), draw(3, 60)
    generated.X.data[0] = 0  # an explicit zero
    stored = generated.X.nnz
    scores = evaluate(train, test, generated, seeds=2, metrics=FEW)
    assert generated.X.nnz == stored
    generated.X = generated.X.toarray()
    assert evaluate(train, test, generated, seeds=2, metrics=FEW).as_json() == scores.as_json()


def error(train: AnnData, test: AnnData, generated: AnnData, cell_type: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(train, test, generated, cell_type=cell_type, metrics=FEW)
    return str(caught.value)


def test_sorted_blood_cells(pbmc: AnnData) -> None:
    """All 16,791 genes, 80/20: held-out cells are at the ceiling, the baseline is clearly below it."""
    order = np.random.default_rng(0).permutation(pbmc.n_obs)
    test, fresh, train = (pbmc[rows].copy() for rows in np.split(order, [500, 1260]))
    scores = evaluate(train, test, fresh, cell_type="celltype")
    assert [s.metric.key for s in scores.scores if s.judgement is None or s.judgement.differs] == []
    assert 5.0 < scores["w2"].ceiling.mean < 8.0
    assert abs(scores["mmd2"].ceiling.mean) < 0.002
    assert scores["nn_accuracy"].ceiling.mean < 0.54 < 0.56 < scores["nn_accuracy"].baseline.mean
    assert scores["recall"].baseline.mean < 0.84 < 0.88 < scores["recall"].ceiling.mean
    assert scores["classifier"].ceiling.mean < 0.54 < 0.6 < scores["classifier"].baseline.mean
