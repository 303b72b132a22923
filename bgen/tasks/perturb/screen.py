"""From a user's AnnData of control and perturbed cells to the training data of the perturbation flow.

A label is text: "STAT1", "STAT1+IRF1" for a combination, a drug's name; doses are a column of numbers.

Axes: N cells, K perturbations of a set, P distinct perturbations, D latent size, G genes, E size of a gene's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray

from bgen.data.cells_in_memory import MemoryCells
from bgen.errors import UserError, nearest
from bgen.evaluate.metrics.space import fit_space, log_cp10k
from bgen.genes.table import find_genes
from bgen.models.generators.perturbation_flow import PerturbationSet
from bgen.models.vae.vae import VAE
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.user_cells import UserCells, text_column
from bgen.train.stages.perturbation_pairs import Screen

JOIN = "+"
LEAST_CONTROLS = 20
EMBEDDING_CELLS = 5000


@dataclass(frozen=True)
class Columns:
    """How the data says what was done to a cell.

    Attributes
    ----------
    perturbation
        obs column of labels; a cell without one is left out.
    control
        The label of control cells.
    dose
        obs column of doses, or None.
    strata
        obs columns within which control and perturbed cells are compared, such as cell type and batch.
    """

    perturbation: str
    control: str
    dose: str | None = None
    strata: Sequence[str] = ()


@dataclass(frozen=True)
class ScreenData:
    """Cells in the model's genes, the screen, its labels (``members``, ``dose``), names and target genes of the P."""

    cells: MemoryCells
    screen: Screen
    labels: pd.DataFrame
    names: list[str]
    targets: NDArray[np.int64]
    dose_scale: float


def members(label: str) -> list[str]:
    """Return the perturbations of a label."""
    return [part.strip() for part in label.split(JOIN) if part.strip()]


def read_screen(model: AnnDataModel, cells: UserCells, columns: Columns) -> ScreenData:
    """Prepare control and perturbed cells.

    Raises
    ------
    UserError
        If a column is missing, or there are too few control cells.
    """
    label = text_column(cells.adata, columns.perturbation)
    control = require_controls(label, columns.control, f"obs['{columns.perturbation}']")
    used = np.flatnonzero(label != "")
    cells, label, control = cells[used], label[used], control[used]
    adata = cells.adata
    dose = _doses(adata, columns.dose)
    dose[control] = np.nan
    names = sorted({name for text in np.unique(label[~control]) for name in members(text)})
    targets = find_genes(model.saved.genes, names)
    table = pd.DataFrame({"label": [JOIN.join(sorted(members(text))) for text in label], "dose": dose})
    groups = table[~control].groupby(["label", "dose"], dropna=False, sort=True)
    number = np.full(len(label), -1, np.int64)
    number[~control] = groups.ngroup()
    labels = groups.size().index.to_frame(index=False)
    labels["members"] = [members(text) for text in labels["label"]]
    sets = make_sets(labels["members"].tolist(), labels["dose"].to_numpy(float), names, targets)
    mean, std = whitened_latents(model, cells)
    screen = Screen(
        mean=mean,
        std=std,
        label=number,
        stratum=strata_codes(adata, columns),
        known=sets.known.numpy(),
        gene=sets.gene.numpy(),
        dose=sets.dose.numpy(),
        there=sets.there.numpy(),
    )
    given = dose[np.isfinite(dose) & (dose > 0)]
    scale = float(np.exp(np.log(given).mean())) if len(given) else 1.0
    return ScreenData(MemoryCells(cells.counts, model.covariates(cells)), screen, labels, names, targets, scale)


def strata_codes(adata: AnnData, columns: Columns) -> NDArray[np.int64]:
    """Return the number of the stratum of every cell ``[N]``."""
    if not columns.strata:
        return np.zeros(adata.n_obs, np.int64)
    strata = pd.DataFrame({str(i): text_column(adata, name) for i, name in enumerate(columns.strata)})
    return np.asarray(strata.groupby(list(strata)).ngroup(), np.int64)


def whitened_latents(model: AnnDataModel, cells: UserCells) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation ``[N, D + 1]`` of the whitened latents, log library size last."""
    mean, variance = model.encode(cells)
    library = np.maximum(np.asarray(cells.counts.sum(1)).ravel(), 1.0)
    vae = model.saved.vae
    whitened: NDArray[np.float32] = vae.whiten(
        torch.from_numpy(mean), torch.from_numpy(np.log(library)).float()
    ).numpy()
    std = np.zeros_like(whitened)
    std[:, :-1] = np.sqrt(variance) / vae.latent_std[:-1].numpy()
    return whitened, std


def require_controls(label: NDArray[np.str_], control: str, where: str) -> NDArray[np.bool_]:
    """Return which cells are controls.

    Raises
    ------
    UserError
        If there are fewer than 20.
    """
    found = label == control
    if not found.any():
        there = pd.Series(label[label != ""]).value_counts()
        raise UserError(
            f"{where} has no control cells '{control}'.{nearest(control, list(there.index))}"
            f" Its most frequent values: {', '.join(there.index[:5])}."
        )
    if found.sum() < LEAST_CONTROLS:
        raise UserError(f"{where} has {found.sum()} control cells '{control}'; at least {LEAST_CONTROLS} are needed.")
    return found


def make_sets(
    sets: Sequence[Sequence[str]], dose: NDArray[np.float64], names: Sequence[str], targets: NDArray[np.int64]
) -> PerturbationSet:
    """Return sets ``[len(sets), K]`` of perturbations by name, every member of one at its dose."""
    size = max(1, max(map(len, sets)))
    known, gene = np.full((len(sets), size), -1), np.full((len(sets), size), -1)
    there, doses = np.zeros((len(sets), size), bool), np.full((len(sets), size), np.nan, np.float32)
    place = {name: number for number, name in enumerate(names)}
    for row, parts in enumerate(sets):
        for column, name in enumerate(parts):
            known[row, column], gene[row, column] = place[name], targets[place[name]]
            there[row, column], doses[row, column] = True, dose[row]
    return PerturbationSet(*(torch.from_numpy(values) for values in (known, gene, doses, there)))


def gene_rows(counts: sp.csr_matrix, components: int) -> NDArray[np.float32]:
    """Return co-expression rows ``[G, E]``: each gene's correlation with the principal components of cells ``[N, G]``.

    Genes that vary together have similar rows; a gene that is not expressed has zeros.
    """
    some = counts[np.random.default_rng(0).permutation(counts.shape[0])[:EMBEDDING_CELLS]]
    logs = log_cp10k(some)
    space = fit_space(some, components)
    scores = space.project(some)
    mean = np.asarray(logs.mean(0)).ravel()
    deviation = np.sqrt(np.maximum(np.asarray(logs.multiply(logs).mean(0)).ravel() - mean**2, 0))
    rows = (space.components * scores.std(0)[:, None] / np.maximum(deviation, 1e-3)).T
    padded = np.zeros((counts.shape[1], components), np.float32)
    padded[:, : rows.shape[1]] = rows * np.sqrt(components)
    return padded


def require_plain_counts(vae: VAE) -> None:
    """Check that a VAE can be the base of a perturbation flow."""
    if vae.config.likelihood != "nb":
        raise UserError("Perturbations are predicted on a VAE with vae.likelihood=nb; this one is zero-inflated.")


def _doses(adata: AnnData, column: str | None) -> NDArray[np.float64]:
    if column is None:
        return np.full(adata.n_obs, np.nan)
    if column not in adata.obs:
        raise UserError(f"obs has no column '{column}'.{nearest(column, adata.obs.columns)}")
    numbers = pd.to_numeric(adata.obs[column].astype(object), errors="coerce").to_numpy(np.float64)
    if np.isnan(numbers).all():
        raise UserError(f"obs['{column}'] holds no numbers: a dose is a number in one unit.")
    return numbers
