"""``bgen bench cheats``: cells that are made to deceive, passed off as a model's, and which measure catches them.

The honest control is cells that were measured and that nobody trained on. A score is worth something if the control
passes and no cheat does. Cells are divided at random into test cells, fresh cells (those of a perfect model) and
training cells, from which cheats are made.

Axes: N cells, G genes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from rich.table import Table
from scipy import sparse

from bgen.errors import UserError, nearest
from bgen.evaluate.metrics.classifiers import simulated_doublets, thinned
from bgen.evaluate.protocols import distribution as protocol
from bgen.evaluate.protocols.baselines import fit_type_negative_binomial
from bgen.evaluate.protocols.scores import Scores
from bgen.files import require_new_folder, write_result
from bgen.progress import Say
from bgen.tasks.user_cells import read_input
from bgen.version import __version__

LABEL = "label"
"""obs column of the labels in what is scored."""
TEST_CELLS = 600
RARE = 0.01
COPIES = 0.047
DOUBLETS = 0.05

Labels = NDArray[np.str_]
Made = tuple[sparse.csr_matrix, Labels]


@dataclass(frozen=True)
class Material:
    """What cheats are made of: counts [N, G] and labels [N] of training and of fresh cells."""

    train: sparse.csr_matrix
    train_labels: Labels
    fresh: sparse.csr_matrix
    fresh_labels: Labels
    rng: np.random.Generator

    def like(self, labels: Labels) -> NDArray[np.intp]:
        """Return a random training cell for each label."""
        return np.array([self.rng.choice(np.flatnonzero(self.train_labels == label)) for label in labels.tolist()])

    @property
    def common(self) -> str:
        """The commonest label."""
        return Counter(self.train_labels.tolist()).most_common(1)[0][0]

    @property
    def rarest(self) -> str:
        """The rarest label."""
        return Counter(self.train_labels.tolist()).most_common()[-1][0]


def honest(m: Material) -> Made:
    """Fresh cells as they are."""
    return m.fresh, m.fresh_labels


def shuffled_labels(m: Material) -> Made:
    """Fresh cells whose labels are anybody's: what was asked for is ignored."""
    return m.fresh, m.rng.permutation(m.fresh_labels)


def doublets(m: Material) -> Made:
    """Fresh cells, one in twenty of which is two in one."""
    number = round(DOUBLETS * m.fresh.shape[0])
    made = simulated_doublets(m.fresh, number, m.rng)
    return sparse.csr_matrix(sparse.vstack([made, m.fresh[number:]])), m.fresh_labels


def replaced_type(m: Material) -> Made:
    """Fresh cells, but those of the rarest label are of the commonest."""
    rows = np.flatnonzero(m.fresh_labels == m.rarest)
    stand_in = m.rng.choice(np.flatnonzero(m.fresh_labels == m.common), len(rows))
    return _with_rows(m.fresh, rows, m.fresh[stand_in]), m.fresh_labels


def copies(m: Material) -> Made:
    """Training cells."""
    return m.train[m.like(m.fresh_labels)], m.fresh_labels


def few_copies(m: Material) -> Made:
    """Fresh cells, 4.7 % of which are training cells."""
    rows = np.arange(round(COPIES * m.fresh.shape[0]))
    return _with_rows(m.fresh, rows, m.train[m.like(m.fresh_labels[rows])]), m.fresh_labels


def near_copies(m: Material) -> Made:
    """90 % of one training cell and 10 % of another."""
    one, other = (m.train[m.like(m.fresh_labels)] for _ in range(2))
    return sparse.csr_matrix(thinned(one, 0.9, m.rng) + thinned(other, 0.1, m.rng)), m.fresh_labels


def halves(m: Material) -> Made:
    """Halves of two training cells of the label."""
    one, other = (m.train[m.like(m.fresh_labels)] for _ in range(2))
    return sparse.csr_matrix(thinned(one, 0.5, m.rng) + thinned(other, 0.5, m.rng)), m.fresh_labels


def collapse(m: Material) -> Made:
    """A tenth of the training cells, again and again, with 30 % of another cell each."""
    few = np.zeros(len(m.train_labels), bool)
    for label in np.unique(m.train_labels):
        rows = np.flatnonzero(m.train_labels == label)
        few[m.rng.choice(rows, max(2, len(rows) // 10), replace=False)] = True
    some = Material(m.train[few], m.train_labels[few], m.fresh, m.fresh_labels, m.rng)
    one, other = some.train[some.like(m.fresh_labels)], m.train[m.like(m.fresh_labels)]
    return sparse.csr_matrix(thinned(one, 0.7, m.rng) + thinned(other, 0.3, m.rng)), m.fresh_labels


def permuted_genes(m: Material) -> Made:
    """Training cells in which each gene is anybody's of the label: no gene goes with another."""
    dense = m.train[m.like(m.fresh_labels)].toarray()
    for label in np.unique(m.fresh_labels):
        rows = np.flatnonzero(m.fresh_labels == label)
        dense[rows] = m.rng.permuted(dense[rows], axis=0)
    return sparse.csr_matrix(dense), m.fresh_labels


def swapped_names(m: Material) -> Made:
    """Fresh cells in which neighbours in mean expression have each other's name, among the first 2,000 genes."""
    order = np.argsort(-np.asarray(m.train.mean(axis=0)).ravel(), kind="stable")[:2000]
    order = order[: len(order) // 2 * 2]
    names = np.arange(m.train.shape[1])
    names[order[::2]], names[order[1::2]] = order[1::2], order[::2]
    return sparse.csr_matrix(m.fresh[:, names]), m.fresh_labels


def majority(m: Material) -> Made:
    """Cells of the commonest label only, under the labels that were asked for."""
    return m.train[m.like(np.full(len(m.fresh_labels), m.common))], m.fresh_labels


def poisson(m: Material) -> Made:
    """Poisson noise around the mean of the label, with the library sizes of fresh cells."""
    library = np.asarray(m.fresh.sum(axis=1)).ravel()
    made = []
    for label, size in zip(m.fresh_labels.tolist(), library.tolist(), strict=True):
        total = np.asarray(m.train[m.train_labels == label].sum(axis=0)).ravel()
        made.append(sparse.csr_matrix(m.rng.poisson(total / total.sum() * size).astype(np.float32)))
    return sparse.csr_matrix(sparse.vstack(made)), m.fresh_labels


def typewise(m: Material) -> Made:
    """A negative binomial per label."""
    return fit_type_negative_binomial(m.train, m.train_labels).sample(m.fresh_labels, 7), m.fresh_labels


@dataclass(frozen=True)
class Cheat:
    """One way to deceive.

    Attributes
    ----------
    name
        For people.
    make
        From the material to counts and labels.
    caught_by
        Keys of which at least one must not be as good as of real cells: metrics, and "memorisation" and "labels".
    cells
        n, where not :data:`TEST_CELLS`.
    """

    name: str
    make: Callable[[Material], Made]
    caught_by: tuple[str, ...]
    cells: int | None = None


AGREEMENT = f"agreement_{LABEL}"
CHEATS: tuple[Cheat, ...] = (
    Cheat("unseen real cells (the control)", honest, ()),
    Cheat("labels shuffled", shuffled_labels, ("labels", AGREEMENT, f"energy_within_{LABEL}")),
    Cheat("5 % doublets", doublets, ("doublets",)),
    Cheat("a type of 1 % made of another", replaced_type, ("labels",)),
    Cheat("copies of training cells", copies, ("memorisation",)),
    Cheat("4.7 % copies", few_copies, ("memorisation",), 300),
    Cheat("90 % of one and 10 % of another training cell", near_copies, ("memorisation",)),
    Cheat("halves of two training cells", halves, ("memorisation", "nn_accuracy", "precision")),
    Cheat("collapse to a tenth of the training cells", collapse, ("memorisation", "nn_accuracy", "recall")),
    Cheat(
        "each gene permuted within its label", permuted_genes, ("recall", "nn_accuracy", "correlation", "classifier")
    ),
    Cheat("gene names swapped", swapped_names, ("classifier", "zeros_spearman", "mean_spearman")),
    Cheat("the commonest label only", majority, ("labels", "energy")),
    Cheat("Poisson around the label's mean", poisson, ("zeros_rmse", "recall", "classifier")),
    Cheat("negative binomial per label, few cells", typewise, ("recall", "nn_accuracy"), 40),
)


@dataclass(frozen=True)
class Divided:
    """Sets to score with, and the material of cheats."""

    train: AnnData
    test: AnnData
    material: Material


def divide(
    counts: sparse.csr_matrix, labels: Labels, test_cells: int, *, rare: float | None = RARE, seed: int = 0
) -> Divided:
    """Divide cells into test cells, twice as many fresh ones, and training cells; thin the rarest label to ``rare``."""
    rng = np.random.default_rng(seed)
    parts = np.split(rng.permutation(counts.shape[0]), [test_cells, 3 * test_cells])
    if rare is not None:
        last = Counter(labels.tolist()).most_common()[-1][0]
        kept = []
        for part in parts:
            own = np.flatnonzero(labels[part] == last)
            most = max(2, round(rare * len(part)))
            kept.append(np.delete(part, own[most:]))
        parts = kept
    test, fresh, train = parts
    material = Material(counts[train], labels[train], counts[fresh], labels[fresh], rng)
    return Divided(as_cells(counts[train], labels[train]), as_cells(counts[test], labels[test]), material)


def as_cells(counts: sparse.csr_matrix, labels: Labels) -> AnnData:
    """Return counts and labels as AnnData."""
    names = pd.Index([f"cell_{i}" for i in range(counts.shape[0])])
    genes = pd.DataFrame(index=pd.Index([f"gene_{i}" for i in range(counts.shape[1])]))
    return AnnData(sparse.csr_matrix(counts, dtype=np.float32), pd.DataFrame({LABEL: labels}, index=names), genes)


def score_cheat(divided: Divided, cheat: Cheat, **options: Any) -> Scores:
    """Score the cells of a cheat as if a model had made them; ``options`` go to the protocol's ``evaluate``."""
    material, test, n = divided.material, divided.test, cheat.cells
    if n is not None:
        material = replace(material, fresh=material.fresh[:n], fresh_labels=material.fresh_labels[:n])
        test = test[:n].copy()
    counts, labels = cheat.make(material)
    return protocol.evaluate(divided.train, test, as_cells(counts, labels), cell_type=LABEL, **options)


def findings(scores: Scores) -> tuple[list[str], list[str]]:
    """Return the keys that catch, and those that cannot tell: metrics, "memorisation" and "labels"."""
    judged = {score.metric.key: score.judgement for score in scores.scores}
    caught = [key for key, told in judged.items() if told is not None and told.differs]
    if scores.copied is not None and scores.copied.found:
        caught.insert(0, "memorisation")
    if any(label.missed for label in scores.labels):
        caught.insert(0, "labels")
    unsure = [key for key, told in judged.items() if told is None or not (told.differs or told.equivalent)]
    return caught, unsure


@dataclass(frozen=True)
class CheatTable:
    """What was found of each cheat, and the facts that belong to it."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]]

    def table(self) -> Table:
        """Return the findings, one line each."""
        table = Table(title=f"Cheats on {self.facts['data']}: {self.facts['genes']:,} genes", box=None, pad_edge=False)
        for name in ("", "n", "as good", "caught by", "cannot tell"):
            table.add_column(name)
        for row in self.rows:
            told = (", ".join(row[kind]) or "-" for kind in ("caught", "unsure"))
            table.add_row(row["name"], str(row["cells"]), f"{row['equivalent']} of {row['measures']}", *told)
        return table

    def headline(self) -> str:
        """Return one sentence in plain words."""
        control, *cheats = self.rows
        found = sum(bool(row["caught"]) for row in cheats)
        unsure = sum(not row["caught"] and bool(row["unsure"]) for row in cheats)
        return (
            f"{found} of {len(cheats)} cheats are caught and {unsure} more are not called as good as real cells; of"
            f" unseen real cells {control['equivalent']} of {control['measures']} measures say that they are."
        )


def bench_cheats(
    file: Path, out: Path, *, label: str, cells: int = TEST_CELLS, seeds: int = 3, say: Say = print
) -> CheatTable:
    """Score every cheat and write ``cheats.json`` into ``out``, after each.

    Parameters
    ----------
    file
        .h5ad of counts.
    label
        obs column.
    cells
        n.

    Raises
    ------
    UserError
        If the column is not there, or there are fewer than five times ``cells``.
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}.")
    adata = read_input(file)
    if label not in adata.obs:
        raise UserError(f"{file.name} has no column '{label}' in obs.{nearest(label, adata.obs.columns)}")
    if adata.n_obs < 5 * cells:
        raise UserError(f"{5 * cells} cells are needed to compare {cells}; {file.name} holds {adata.n_obs}.")
    require_new_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    divided = divide(sparse.csr_matrix(adata.X, dtype=np.float32), adata.obs[label].astype(str).to_numpy(str), cells)
    facts = {"data": file.name, "version": __version__, "genes": adata.n_vars, "cells": cells, "seeds": seeds}
    facts |= {"train": divided.train.n_obs, "protocol": protocol.PROTOCOL}
    told = CheatTable(facts, [])
    for cheat in CHEATS:
        scores = score_cheat(divided, cheat, seeds=seeds)
        caught, unsure = findings(scores)
        equal = sum(s.judgement is not None and s.judgement.equivalent for s in scores.scores)
        told.rows.append(
            {
                "name": cheat.name,
                "cells": scores.cells,
                "measures": len(scores.scores),
                "equivalent": equal,
                "at_the_ceiling": sum(s.verdict == "at the ceiling" for s in scores.scores),
                "caught": caught,
                "unsure": unsure,
                "headline": scores.headline(),
                "scores": scores.as_json()["metrics"],
            }
        )
        write_result(out / "cheats.json", json.dumps({**facts, "rows": told.rows}, indent=1) + "\n")
        say(f"{cheat.name}: {scores.headline()}")
    return told


def _with_rows(counts: sparse.csr_matrix, rows: NDArray[np.intp], others: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return counts in which some rows are others."""
    source = np.arange(counts.shape[0])
    source[rows] = counts.shape[0] + np.arange(len(rows))
    return sparse.csr_matrix(sparse.vstack([counts, others], format="csr")[source])
