"""The protocol for perturbations: real cells reach the top, every figure falls where it must, and cheats are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.errors import UserError
from bgen.evaluate.protocols.perturbation import METRICS, HeldOut, evaluate_perturbations, mean_log
from bgen.evaluate.protocols.perturbation_scores import CEILING, CONTROL_COPY, DUPLICATE, MODEL, PerturbationScores

GENES = 80
NOTHING = np.array([], np.int64)
Predict = Callable[[int], sp.csr_matrix]


class Screen:
    """``n`` perturbations that share a part of their effects, in two replicates that differ."""

    def __init__(self, seed: int, n: int = 10, *, strength: float = 0.8, real: int = 160, controls: int = 400) -> None:
        self.rng = np.random.default_rng(seed)
        self.base = self.rng.dirichlet(np.full(GENES, 3.0))
        self.loadings = self.rng.normal(0, 0.5, (2, GENES))
        shared = self._effect(strength)
        self.effects = [0.7 * shared + self._effect(strength) for _ in range(n)]
        self.control = self.cells(np.zeros(GENES), controls)
        self.real = [self.moved(effect, self.cells(np.zeros(GENES), real)) for effect in self.effects]
        self.sources = np.arange(controls)
        self.truth = np.array([self._on_mean_log(effect) for effect in self.effects])

    def _effect(self, strength: float) -> np.ndarray:
        return np.where(self.rng.random(GENES) < 0.3, self.rng.normal(0, strength, GENES), 0)

    def cells(self, effect: np.ndarray, n: int) -> sp.csr_matrix:
        shares = self.base * np.exp(effect + self.rng.normal(size=(n, 2)) @ self.loadings)
        library = self.rng.lognormal(7, 0.3, n)[:, None]
        return sp.csr_matrix(self.rng.poisson(shares * library / shares.sum(1, keepdims=True)).astype(np.float32))

    def _on_mean_log(self, effect: np.ndarray) -> np.ndarray:
        return mean_log(self.moved(effect)) - mean_log(self.control)

    def moved(self, effect: np.ndarray, cells: sp.csr_matrix | None = None) -> sp.csr_matrix:
        """Control cells whose counts are thinned or added to by a fold change per gene, shares adding up to 1."""
        counts = (self.control if cells is None else cells).toarray()
        fold = np.exp(effect)
        fold = fold * (counts.sum() / (counts * fold).sum())
        more = self.rng.poisson(np.maximum(fold - 1, 0) * counts)
        less = self.rng.binomial(counts.astype(int), np.minimum(fold, 1))
        return sp.csr_matrix(np.where(fold > 1, counts + more, less).astype(np.float32))

    def held_out(self, predict: Predict, *, paired: bool = True) -> list[HeldOut]:
        """``paired``: predicted cells are control cells, one for one."""
        mean = self.truth.mean(0)
        elsewhere = self.truth + self.rng.normal(0, 0.05, self.truth.shape)
        return [
            HeldOut(
                f"p{number}",
                real,
                self.control,
                predict(number),
                {"train mean": mean, "same in training": elsewhere[number]},
                NOTHING,
                sources=self.sources if paired else None,
            )
            for number, real in enumerate(self.real)
        ]


BY_KEY = {metric.key: metric for metric in METRICS}


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen(0)


@pytest.fixture(scope="module")
def honest(screen: Screen) -> PerturbationScores:
    """Control cells moved by the true effects."""
    return evaluate_perturbations(
        screen.control, screen.held_out(lambda number: screen.moved(screen.effects[number])), seeds=2
    )


def test_the_truth_is_at_the_top_and_nothing_is_not(honest: PerturbationScores) -> None:
    for key in ("pearson", "specific", "pearson_top", "direction", "discrimination"):
        assert honest.mean(MODEL, key) > honest.mean(CEILING, key) - 0.03
    for key in ("explained", "explained_de", "calibration"):
        assert honest.mean(MODEL, key) == pytest.approx(1, abs=0.05)
        low, high = honest.interval(MODEL, key)
        assert low < honest.mean(MODEL, key) < high
        assert not honest.has(CEILING, key)  # 1 by construction
    assert honest.mean(MODEL, "energy") < 0.05 * honest.mean(CONTROL_COPY, "energy")
    for key, nothing in (("explained", 0), ("pearson", 0), ("direction", 0.5), ("recovery", 0.5)):
        assert honest.mean(CONTROL_COPY, key) == pytest.approx(nothing, abs=1e-9)
    assert not honest.has(CONTROL_COPY, "calibration")
    assert honest.verdict(CONTROL_COPY, BY_KEY["energy"]) == "better"
    assert honest.verdict(CONTROL_COPY, BY_KEY["calibration"]) is None
    assert honest.headline().startswith("The model explains ")
    assert honest.headline().endswith("and the model is better than it.") or "cannot be told" in honest.headline()


def test_what_is_specific_is_a_correlation_over_all_perturbations(screen: Screen) -> None:
    made = [
        replace(one, baselines={"row": effect})
        for one, effect in zip(screen.held_out(screen.real.__getitem__, paired=False), screen.truth, strict=True)
    ]
    found = evaluate_perturbations(screen.control, made, seeds=2).mean("row", "specific")
    real = np.array([mean_log(one.real) - mean_log(one.control) for one in made])
    expected = np.corrcoef((screen.truth - screen.truth.mean(0)).ravel(), (real - real.mean(0)).ravel())[0, 1]
    assert found == pytest.approx(expected, abs=0.06)  # real effects of half of the cells


def test_the_duplicate_is_near_the_top_in_every_figure_that_ranks_models(honest: PerturbationScores) -> None:
    for key in ("explained", "explained_de", "pearson", "specific", "discrimination"):
        assert honest.mean(DUPLICATE, key) > honest.mean("train mean", key) + 0.1
    assert honest.mean(DUPLICATE, "specific") >= honest.mean(CEILING, "specific") - 0.02
    assert DUPLICATE not in honest.baselines


def test_a_prediction_that_is_the_same_for_all_has_nothing_specific(screen: Screen) -> None:
    """Whatever it is: none, the mean of other cells, or anything at all."""
    anything = screen.rng.normal(size=GENES)
    rows = {"other mean": screen.truth.mean(0) + screen.rng.normal(0, 0.02, GENES), "anything": anything}
    made = [replace(one, baselines=rows) for one in screen.held_out(lambda _: screen.control)]
    scores = evaluate_perturbations(screen.control, made, seeds=2)
    assert scores.mean("other mean", "pearson") > 0.4
    for row in (CONTROL_COPY, *rows):
        assert scores.mean(row, "specific") == pytest.approx(0, abs=1e-9)
    assert scores.mean("anything", "explained") < 0


def test_a_predictor_of_what_can_be_known_is_calibrated_and_an_inflated_one_is_not(screen: Screen) -> None:
    """Least squares has a slope below 1 against the real effects; <p, r> / <p, p'> is 1 all the same."""
    known = screen.truth.mean(0)
    made = [
        replace(one, baselines={"known": known, "x 2.5": 2.5 * known})
        for one in screen.held_out(screen.real.__getitem__, paired=False)
    ]
    scores = evaluate_perturbations(screen.control, made, seeds=2)
    assert scores.mean("known", "calibration") == pytest.approx(1, abs=0.1)
    assert scores.mean("x 2.5", "calibration") == pytest.approx(0.4, abs=0.04)
    assert 0.1 < scores.mean("known", "explained") < 0.7
    assert scores.mean("x 2.5", "explained") < scores.mean("known", "explained")


def test_a_screen_in_which_nothing_happens_has_no_effect_to_measure() -> None:
    for seed in range(3):
        screen = Screen(seed, 8, strength=0.0, real=60, controls=200)
        other = [screen.cells(np.zeros(GENES), 80) for _ in screen.real]
        made = screen.held_out(other.__getitem__, paired=False)
        scores = evaluate_perturbations(screen.control, made, seeds=2)
        for key in ("explained", "explained_de", "calibration"):
            assert not scores.has(MODEL, key), key
        assert np.isnan(scores.interval(MODEL, "explained")).all()
        assert scores.headline().startswith("No effect to measure")
        assert any(sentence.startswith("No effect to measure") for sentence in scores.sentences())
        assert scores.as_json()["rows"][MODEL].keys() & {"explained", "calibration"} == set()


def test_targets_are_left_out_of_every_figure_per_gene(screen: Screen) -> None:
    """Genes whose prediction is absurd change nothing if they are targets."""
    made = screen.held_out(lambda number: screen.moved(screen.effects[number]))
    targets = [np.argsort(-np.abs(effect))[:3] for effect in screen.truth]
    keys = [key for key in BY_KEY if key not in ("energy", "shape")]

    def figures(shift: float) -> dict[str, float]:
        held = []
        for one, genes, effect in zip(made, targets, screen.truth, strict=True):
            row = effect.copy()
            row[genes] += shift
            held.append(replace(one, targets=genes, baselines={"row": row}))
        scores = evaluate_perturbations(screen.control, held, seeds=2)
        return {key: scores.mean("row", key) for key in keys}

    assert figures(0.0) == pytest.approx(figures(50.0))


def test_too_few_real_cells_are_told(screen: Screen) -> None:
    few = HeldOut("x", screen.real[0][:9], screen.control, screen.real[0], {}, NOTHING)
    with pytest.raises(UserError, match=r"at least 20 real cells.*x \(9\)"):
        evaluate_perturbations(screen.control, [few])


def test_few_controls_do_not_set_an_effect_apart_from_its_other_half() -> None:
    screen = Screen(3, 6, strength=0.3)
    few = [replace(one, control=screen.control[:10], sources=None) for one in screen.held_out(screen.real.__getitem__)]
    assert evaluate_perturbations(screen.control, few, seeds=2).mean(CEILING, "discrimination") > 0.8


def test_a_prediction_gains_nothing_from_the_noise_of_the_controls() -> None:
    """Cells that have nothing to do with the few controls, measured against them: r and p would share their noise."""
    screen = Screen(4, 8, strength=0.0, real=200)
    other = screen.cells(np.zeros(GENES), 200)
    made = [replace(one, control=screen.control[:24], sources=None) for one in screen.held_out(lambda _: other)]
    scores = evaluate_perturbations(screen.control, made, seeds=6)
    assert abs(scores.mean(MODEL, "pearson")) < 0.1
    assert abs(scores.mean(CEILING, "pearson")) < 0.15


def test_few_controls_that_are_shared_are_the_reference_of_every_effect() -> None:
    screen = Screen(5, 6, strength=0.2)
    split, shared = (
        evaluate_perturbations(
            screen.control,
            [
                replace(one, control=screen.control[:20], sources=None, baselines={}, shared_controls=whole)
                for one in screen.held_out(screen.real.__getitem__)
            ],
            seeds=2,
        )
        for whole in (False, True)
    )
    assert shared.mean(CEILING, "pearson") > split.mean(CEILING, "pearson") + 0.1
    assert shared.mean(MODEL, "energy") == pytest.approx(split.mean(MODEL, "energy"))


def test_shared_controls_alone_are_no_effect_and_a_real_one_is_seen() -> None:
    """All effects are measured from the same few control cells: their noise is in each of them."""
    for strength, seen in ((0.0, False), (0.6, True)):
        screen = Screen(6, 5, strength=strength, real=60)
        made = [
            replace(one, control=screen.control[:50], sources=None, baselines={}, shared_controls=True)
            for one in screen.held_out(screen.real.__getitem__)
        ]
        scores = evaluate_perturbations(screen.control, made, seeds=2)
        assert scores.has(CONTROL_COPY, "explained") == seen
        assert scores.headline().startswith("No effect to measure") != seen


def test_a_baseline_may_consist_of_real_cells(screen: Screen) -> None:
    nothing = {"moved": np.zeros(GENES), "cells": np.zeros(GENES)}
    made = screen.held_out(lambda number: screen.moved(screen.effects[number]))
    of_cells = [replace(one, baselines=nothing, populations={"cells": one.predicted}) for one in made]
    scores = evaluate_perturbations(screen.control, of_cells, seeds=2)
    assert scores.mean("moved", "energy") == pytest.approx(scores.mean(CONTROL_COPY, "energy"))
    assert scores.mean("cells", "energy") == pytest.approx(scores.mean(MODEL, "energy"), abs=0.15)


@pytest.fixture(scope="module")
def twelve() -> Screen:
    return Screen(1, 12)


def scored(screen: Screen, predict: Callable[[int], sp.csr_matrix], *, paired: bool = True) -> PerturbationScores:
    return evaluate_perturbations(screen.control, screen.held_out(predict, paired=paired), seeds=2)


def calibration(scores: PerturbationScores) -> str:
    (said,) = [sentence for sentence in scores.sentences() if sentence.startswith("Calibration")]
    return said


def test_the_honest_control_passes(twelve: Screen) -> None:
    scores = scored(twelve, lambda number: twelve.moved(twelve.effects[number]))
    for key in ("explained", "explained_de", "pearson", "specific", "energy", "discrimination"):
        assert scores.verdict("train mean", BY_KEY[key]) == "better", key
    assert scores.verdict(CONTROL_COPY, BY_KEY["shape"]) != "worse"
    assert "not shown to be too large or too small" in calibration(scores)


def test_a_wrong_perturbations_effect(twelve: Screen) -> None:
    scores = scored(twelve, lambda number: twelve.moved(twelve.effects[number - 1]))
    for key in ("explained", "energy"):
        assert scores.verdict("train mean", BY_KEY[key]) == "worse", key
    assert scores.interval(MODEL, "specific")[0] < 0
    assert scores.interval(MODEL, "discrimination")[0] < 0.5


def test_effects_that_are_inflated(twelve: Screen) -> None:
    scores = scored(twelve, lambda number: twelve.moved(2.5 * twelve.effects[number]))
    assert "predicted effects are too large" in calibration(scores)
    assert scores.verdict("same in training", BY_KEY["explained"]) == "worse"
    assert scores.verdict("same in training", BY_KEY["energy"]) == "worse"


def test_the_mean_effect_three_times(twelve: Screen) -> None:
    mean = np.mean(twelve.effects, axis=0)
    scores = scored(twelve, lambda _: twelve.moved(3 * mean))
    assert "predicted effects are too large" in calibration(scores)
    for key in ("explained", "explained_de", "energy"):
        assert scores.verdict("train mean", BY_KEY[key]) == "worse", key
    assert scores.headline().startswith("The model explains nothing") or "is worse than it" in scores.headline()
    assert scores.verdict(CONTROL_COPY, BY_KEY["specific"]) != "better"


def test_few_cells_drawn_again_and_again(twelve: Screen) -> None:
    typical = np.argsort(np.abs(twelve.control.toarray() - twelve.control.toarray().mean(0)).sum(1))[:20]
    scores = scored(
        twelve,
        lambda number: twelve.moved(twelve.effects[number], twelve.control[twelve.rng.choice(typical, 200)]),
        paired=False,
    )
    assert scores.verdict(CONTROL_COPY, BY_KEY["shape"]) == "worse"


def test_genes_permuted_over_cells(twelve: Screen) -> None:
    """Every gene keeps its values, so nothing per gene changes; cells do."""

    def permuted(number: int) -> sp.csr_matrix:
        return sp.csr_matrix(twelve.rng.permuted(twelve.moved(twelve.effects[number]).toarray(), axis=0))

    scores = scored(twelve, permuted, paired=False)
    assert scores.mean(MODEL, "pearson") > 0.9
    assert scores.verdict(CONTROL_COPY, BY_KEY["shape"]) == "worse"
    assert scores.verdict("same in training", BY_KEY["energy"]) == "worse"


def test_controls_of_another_replicate(twelve: Screen) -> None:
    shift = twelve.rng.normal(0, 0.8, GENES)
    scores = scored(twelve, lambda _: twelve.cells(shift, 200), paired=False)
    for key in ("explained", "energy"):
        assert scores.verdict(CONTROL_COPY, BY_KEY[key]) == "worse", key
    assert scores.verdict(CONTROL_COPY, BY_KEY["specific"]) != "better"
    assert scores.headline().startswith("The model explains nothing")
