"""Scores of annotation and denoising: rare labels count, and the answer is not seen."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import bgen
from bgen.tasks.cells import annotate, denoise
from bgen.tasks.cells.annotate import choose, cross_validated_f1


def test_a_rare_label_that_is_never_found_halves_the_figure() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 3)).astype(np.float32)  # say nothing of the labels
    labels = np.repeat(["common", "rare"], [184, 16])
    assert cross_validated_f1(features, labels) == pytest.approx(0.48, abs=0.03)


def test_labels_are_told_by_what_tells_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotate, "STRENGTHS", annotate.STRENGTHS[3:])  # each costs 45 fits
    rng = np.random.default_rng(0)
    labels = np.repeat(["A", "B", "rare"], [150, 140, 10])
    mean = np.full((300, 40), 3.0)
    mean[labels == "B", 0] = mean[labels == "rare", 1] = 30.0  # one gene of many, and few components know of it
    counts = sp.csr_matrix(rng.poisson(mean).astype(np.float32))
    noise = rng.normal(size=(300, 4)).astype(np.float32)
    truth = (labels[:, None] == np.unique(labels)).astype(np.float32)
    rows = np.arange(0, 300, 2)
    chosen, scores = choose(counts, noise, labels, rows, seed=0)
    assert chosen.name != "latent states"
    assert scores[chosen.name] > scores["latent states"] + 0.3
    assert choose(counts, truth, labels, rows, seed=0)[0].name == "latent states"
    assert choose(counts, noise, labels, rows, seed=0)[1] == scores


def test_calibration_compares_one_half_with_what_the_other_tells(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bgen.load(demo.model)
    cells = model.read(anndata.read_h5ad(demo.cells)[:40].copy())
    first, second = (sp.csr_matrix(np.full((40, len(model.genes)), value, np.float32)) for value in (1.0, 2.0))
    compared: list[np.ndarray] = []

    class Nothing:
        def as_json(self) -> dict[str, float]:
            return {}

    def look(counts: sp.csr_matrix, mean: np.ndarray, theta: np.ndarray, *, seed: int) -> Nothing:
        compared.extend([counts.toarray(), mean])
        return Nothing()

    monkeypatch.setattr(denoise, "split_molecules", lambda counts, seed: (first, second))
    losses = {"model": np.arange(40.0), "pca": np.arange(40.0) + 1, "raw": np.full(40, 90.0)}
    monkeypatch.setattr(denoise, "molecular_cross_validation", lambda *args, **options: losses)
    monkeypatch.setattr(denoise, "_expected", lambda model, cells, *args: cells.counts.toarray())
    monkeypatch.setattr(denoise, "calibration", look)
    scores = denoise.denoising_scores(model, cells)
    assert (scores["model"], scores["baseline"], scores["verdict"]) == (19.5, "pca", "better than the baseline")
    assert (compared[0] == 2).all()
    assert (compared[1] == 1).all()
