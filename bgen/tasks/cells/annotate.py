"""``bgen annotate``: labels with a probability, and none where the model cannot tell.

A logistic regression. It learns from the user's own labelled cells, and sees of them what tells labels apart best by
cross-validation: the model's latent states, principal components, or the most variable genes. If no cell has a label,
it learns the latent states of cells that the model generates for each of its training labels. It abstains for two
reasons: no label is probable enough, or the cell's latent state lies further from the reference than those of reference
cells lie from each other. Such a cell may be of a type that the reference lacks, which a probability cannot tell.

Axes: N cells, D features (of latent states: the latent size), K labels.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError, nearest
from bgen.models.annotator import Annotator
from bgen.models.generators.latent_flow import LatentFlow
from bgen.names import key, keys
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.cells.colours import GREY, colours_of
from bgen.tasks.cells.features import BLOCK, ComponentFeatures, Features, GeneFeatures, LatentFeatures
from bgen.tasks.columns import text_column
from bgen.tasks.time.trajectories import generate_as_trained
from bgen.tasks.user_cells import UserCells

ABSTAINED = "unknown"
LEAST_CELLS = 5
"""Reference cells that a label needs."""

GENERATED_CELLS = 200
"""Cells generated per training label where the user has no reference."""

NEIGHBOURS = 5
NOVEL_QUANTILE = 0.995
STRENGTHS = [0.0003, 0.003, 0.03, 0.3, 3.0]
"""Inverse strengths of the penalty, of which cross-validated log-likelihood chooses one, so that probabilities are
calibrated.
"""

MOST_COMPARED = 2_000
"""Reference cells that the comparison takes, and from which a classifier of genes learns, at most."""


def annotate_cells(
    model: AnnDataModel,
    cells: UserCells,
    label: str | None = None,
    *,
    threshold: float = 0.5,
    seed: int = 0,
) -> AnnData:
    """Return a copy of the data with labels.

    Parameters
    ----------
    label
        obs column. Cells that have a value there are the reference; where the column is missing or empty, the model's
        own training labels of that name are. None: the labels that the model was fine-tuned for.
    threshold
        Least probability of a label; below it the cell is "unknown".

    Returns
    -------
    AnnData
        With obs ``{label}_bgen`` (the label, or "unknown"), ``{label}_probability`` and ``{label}_novelty`` (above 1
        the cell is "unknown"), all probabilities in ``obsm['{label}_probabilities']`` and a summary in
        ``uns['bgen_annotate']``. A "/" in a name is "_" in what is written. Where ``uns['{label}_colors']`` has colours
        of the categories, as scanpy keeps them, ``uns['{label}_bgen_colors']`` has the same.

    Raises
    ------
    UserError
        If there is neither a reference nor a model that knows the labels, or fewer than two labels have enough
        reference cells.
    """
    if not 0 <= threshold < 1:
        raise UserError(f"The threshold is a probability from 0 to below 1, not {threshold:g}.")
    if label is None:
        annotated, summary = _with_its_own_head(model, cells, threshold)
        query = None
    else:
        adata = cells.adata
        latents = model.whiten(model.encode(cells)[0])
        given = text_column(adata, label) if label in adata.obs else np.full(len(cells), "")
        learnt = learn_labels(model, cells.counts, latents, given, label, adata.obs.columns, seed)
        parts = [slice(first, first + BLOCK) for first in range(0, len(cells), BLOCK)]
        probabilities = np.concatenate([learnt.probabilities(cells.counts[part], latents[part]) for part in parts])
        annotated = _told(cells, label, learnt.labels, probabilities, threshold, learnt.novelty.of(latents))
        labelled = without_rare(given)[0] != ""
        query = ~labelled if not labelled.all() else None
        summary = {"model": model.saved.fingerprint(), "label": label, "threshold": threshold, **learnt.summary}
    told = annotated.obs[f"{key(summary['label'])}_bgen"].to_numpy()
    told = told if query is None else told[query]
    annotated.uns["bgen_annotate"] = {**summary, "query_cells": len(told), "abstained": int((told == ABSTAINED).sum())}
    return annotated


@dataclass(frozen=True)
class Learnt:
    """Labels, learnt from reference cells.

    Attributes
    ----------
    features, classifier
        What the classifier sees of a cell, and the classifier.
    novelty
        How far from the reference a cell lies.
    summary
        What was learnt from, for ``uns``.
    """

    features: Features
    classifier: Any
    novelty: Novelty
    summary: dict[str, Any]

    @property
    def labels(self) -> NDArray[np.str_]:
        """The labels ``[K]``, in order."""
        return self.classifier.classes_.astype(str)

    def probabilities(self, counts: sp.csr_matrix, latents: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the probability of each label ``[N, K]`` for counts ``[N, G]`` and whitened latents ``[N, D]``."""
        return self.classifier.predict_proba(self.features.of(counts, latents))


def learn_labels(
    model: AnnDataModel,
    counts: sp.csr_matrix,
    latents: NDArray[np.float32],
    given: NDArray[np.str_],
    label: str,
    columns: Iterable[object],
    seed: int = 0,
) -> Learnt:
    """Learn labels from the cells that have one, or from cells that the model generates if none has.

    Parameters
    ----------
    counts, latents
        Of cells, those without a label among them: ``[N, G]``, and whitened ``[N, D]``.
    given
        Their labels ``[N]``, "" where there is none.
    label, columns
        Name of the column, and those of all obs columns for a message.

    Raises
    ------
    UserError
        If there is neither a reference nor a model that knows the labels, or fewer than two labels have enough
        reference cells.
    """
    given, rare = without_rare(given)
    rows = np.flatnonzero(given != "")
    summary: dict[str, Any] = {}
    features: Features
    if len(rows):
        names = given[rows]
        require_labels(names)
        summary["reference"] = "labelled cells of the data"
        features, summary["macro_f1"] = choose(counts, latents, given, rows, seed)
        reference, learnt = latents[rows], rows[_some(names, seed)] if isinstance(features, GeneFeatures) else rows
        classifier = fit_classifier(features.of(counts[learnt], latents[learnt]), given[learnt])
    else:
        features = LatentFeatures()
        reference, names = _generated_reference(model, label, columns, seed)
        require_labels(names)
        summary["reference"] = "cells generated by the model"
        classifier = fit_classifier(reference, names)
    summary["reference_cells"] = _by_key(Counter(names.tolist()))
    summary["too_rare"] = _by_key(rare)
    summary["seen"] = features.name
    return Learnt(features, classifier, Novelty.of_reference(reference), summary)


def without_rare(given: NDArray[np.str_]) -> tuple[NDArray[np.str_], dict[str, int]]:
    """Return labels ``[N]`` without those of fewer than five cells, and these with their cells.

    Nothing can be learned from so few; their cells are annotated like those without a label. Labels stay as they are if
    fewer than two would be left: :func:`fit_head` says so.
    """
    names, numbers = np.unique(given[given != ""], return_counts=True)
    few = numbers < LEAST_CELLS
    if not few.any() or (~few).sum() < 2:
        return given, {}
    rare = {str(name): int(n) for name, n in zip(names[few], numbers[few], strict=True)}
    return np.where(np.isin(given, names[few]), "", given), rare


def _by_key(numbers: Mapping[str, int]) -> dict[str, int]:
    """Return numbers by names that can be written."""
    return {key: numbers[name] for name, key in keys(numbers).items()}


def _with_its_own_head(model: AnnDataModel, cells: UserCells, threshold: float) -> tuple[AnnData, dict[str, Any]]:
    """Annotate with the classifier that fine-tuning trained; also return what ``uns`` says of it."""
    module, summary = own_head(model, threshold)
    mean = torch.from_numpy(model.encode(cells)[0]).to(model.device)
    probabilities = module.probabilities(mean).cpu().double().numpy()
    return _told(cells, summary["label"], own_labels(model), probabilities, threshold, None), summary


def own_head(model: AnnDataModel, threshold: float) -> tuple[Annotator, dict[str, Any]]:
    """Return the classifier that fine-tuning trained, and what ``uns`` says of it.

    Raises
    ------
    UserError
        If the model has none.
    """
    module, about = model.saved.module, model.saved.about
    if not isinstance(module, Annotator):
        raise UserError(
            "Give --label, the obs column with the labels of your reference cells: only a model made by"
            " `bgen finetune --task annotate` has labels of its own."
        )
    assert about.annotation is not None, "checked when it was loaded"
    return module, {
        "model": model.saved.fingerprint(),
        "label": about.annotation.label,
        "threshold": threshold,
        "reference": "cells that the model was fine-tuned on",
        "reference_cells": {"all": about.cells},
    }


def own_labels(model: AnnDataModel) -> NDArray[np.str_]:
    """Return the labels ``[K]`` of a model that has a classifier."""
    assert model.saved.about.annotation is not None, "checked when it was loaded"
    return np.array(model.saved.about.annotation.labels)


def _told(
    cells: UserCells,
    label: str,
    classes: NDArray[np.str_],
    probabilities: NDArray[np.float64],
    threshold: float,
    novelty: NDArray[np.float64] | None,
) -> AnnData:
    """Return a copy with the columns that :func:`annotate_cells` promises; novelty only where it is known."""
    told, probability = decide(classes, probabilities, threshold, novelty)
    annotated = cells.copy()
    name = key(label)
    annotated.obs[f"{name}_bgen"] = pd.Categorical(told)
    if colours := colours_of(annotated, label):
        names = annotated.obs[f"{name}_bgen"].cat.categories
        annotated.uns[f"{name}_bgen_colors"] = [colours.get(str(one), GREY) for one in names]
    annotated.obs[f"{name}_probability"] = probability
    if novelty is not None:
        annotated.obs[f"{name}_novelty"] = novelty
    named = list(keys(classes).values())
    annotated.obsm[f"{name}_probabilities"] = pd.DataFrame(probabilities, index=annotated.obs_names, columns=named)
    return annotated


def decide(
    classes: NDArray[np.str_],
    probabilities: NDArray[np.float64],
    threshold: float,
    novelty: NDArray[np.float64] | None,
) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
    """Return the label of each cell ``[N]``, or "unknown", and the probability of the most probable one."""
    best = probabilities.argmax(1)
    probability = probabilities[np.arange(len(best)), best]
    sure = (probability >= threshold) & (novelty is None or novelty <= 1)
    return np.where(sure, classes[best], ABSTAINED), probability


def require_labels(labels: NDArray[np.str_]) -> None:
    """Raise UserError if there is one label ``[N]`` only, or one has fewer than five cells."""
    names, numbers = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise UserError(f"All reference cells have the label '{names[0]}': at least two labels are needed.")
    short = [f"{name} ({n})" for name, n in zip(names, numbers, strict=True) if n < LEAST_CELLS]
    if short:
        raise UserError(
            f"These labels have fewer than {LEAST_CELLS} reference cells: {', '.join(short)}. Label more cells, or"
            " empty their label so that they are annotated like the others."
        )


def choose(
    counts: sp.csr_matrix, latents: NDArray[np.float32], labels: NDArray[np.str_], rows: I64, seed: int
) -> tuple[Features, dict[str, float]]:
    """Return what tells labels ``[N]`` of the reference cells ``rows`` apart best, and the macro-F1 of each candidate.

    Candidates are latents ``[N, D]``, principal components and the most variable genes of counts ``[N, G]``, each by
    cross-validation on the same reference cells; of equals the first is taken.
    """
    some = rows[_some(labels[rows], seed)]
    candidates: list[Features] = [LatentFeatures(), ComponentFeatures.fit(counts), GeneFeatures.fit(counts)]
    scores = {
        features.name: cross_validated_f1(features.of(counts[some], latents[some]), labels[some])
        for features in candidates
    }
    return max(candidates, key=lambda features: scores[features.name]), scores


def _some(labels: NDArray[np.str_], seed: int) -> I64:
    """Return places of about :data:`MOST_COMPARED` of the labels ``[N]``, ascending; rare ones stay."""
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = []
    for name in np.unique(labels):
        places = order[labels[order] == name]
        kept.append(places[: max(LEAST_CELLS, round(MOST_COMPARED * len(places) / max(len(labels), MOST_COMPARED)))])
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True)
class Novelty:
    """How far cells lie from reference cells, relative to how far these lie from each other.

    Attributes
    ----------
    neighbours
        Finds the nearest reference cells.
    usual
        Distance to the 5th nearest other one that few reference cells exceed.
    """

    neighbours: Any
    usual: float

    @classmethod
    def of_reference(cls, reference: NDArray[np.float32]) -> Novelty:
        """Fit to whitened latents of reference cells ``[N, D]``."""
        from sklearn.neighbors import NearestNeighbors  # slow to import: only where cells are annotated

        neighbours = NearestNeighbors().fit(reference)
        among, _ = neighbours.kneighbors(reference, n_neighbors=NEIGHBOURS + 1)  # the first is the cell itself
        return cls(neighbours, float(np.quantile(among[:, -1], NOVEL_QUANTILE)))

    def of(self, latents: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ``[n]``: distance to the 5th nearest of the reference cells, relative to that among themselves."""
        distance, _ = self.neighbours.kneighbors(latents, n_neighbors=NEIGHBOURS)
        return np.asarray(distance[:, -1] / self.usual)


def fit_classifier(features: NDArray[np.float32], labels: NDArray[np.str_]) -> Any:
    """Fit the classifier on features ``[N, D]``, of about unit variance, with their labels ``[N]``."""
    from sklearn.exceptions import ConvergenceWarning

    classifier, _ = _cross_validated(features, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(features, labels)


def cross_validated_f1(features: NDArray[np.float32], labels: NDArray[np.str_]) -> float:
    """Return the macro-F1 of the same kind of classifier on features ``[N, D]``, each cell predicted from others."""
    from sklearn.metrics import f1_score

    scaled = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    return float(f1_score(labels, _cross_validated(scaled, labels)[1], average="macro"))


def _cross_validated(features: NDArray[np.float32], labels: NDArray[np.str_]) -> tuple[Any, NDArray[np.str_]]:
    """Return the classifier, not fitted, of the best strength, and the label of each cell as told from others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    names, numbers = np.unique(labels, return_counts=True)
    folds = StratifiedKFold(min(5, int(numbers.min())), shuffle=True, random_state=0)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=300)
            told = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")
            found.append((log_loss(labels, told, labels=names), model, names[told.argmax(1)]))
    _, best, told = min(found, key=lambda entry: entry[0])
    return best, told


def _generated_reference(
    model: AnnDataModel, label: str, columns: Iterable[object], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Return whitened latents of cells generated per training label, and their labels."""
    module = model.saved.module
    known = model.saved.columns
    names = [name for name, info in known.items() if info.kind == "category" and isinstance(module, LatentFlow)]
    names = [name for name in names if name in model.conditions]
    column = next((name for name in names if label in (name, known[name].role)), None)
    if column is None:
        there = list(columns)
        raise UserError(
            f"There is nothing to learn '{label}' from: no cell of the data has a value in obs['{label}']"
            f"{'' if label in there else ', which is not there'}, and the model was not trained on such labels."
            f"{nearest(label, [*there, *names])} Label some cells in that column, and leave it empty for"
            " the others."
        )
    parts, labels = [], []
    for number, name in enumerate(known[column].categories):
        made = generate_as_trained(
            model.saved, GENERATED_CELLS, where={column: name}, settings=model.saved.sample, seed=seed + number
        )
        parts.append(model.whiten(model.encode(made)[0]))
        labels += [name] * GENERATED_CELLS
    return np.concatenate(parts), np.array(labels)
