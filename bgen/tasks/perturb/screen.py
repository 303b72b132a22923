"""From a user's AnnData of control and perturbed cells to the training data of the perturbation flow.

Labels are read by :mod:`data_tools.check.labels`, doses by :mod:`data_tools.check.quantities`.

Axes: N cells, K perturbations of a set, P distinct perturbations, D latent size, G genes, E size of a gene's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from bgen.data.cells_in_memory import MemoryCells
from bgen.errors import UserError, nearest
from bgen.genes.table import find_genes
from bgen.models.codec import Codec
from bgen.models.vae.vae import VAE
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.columns import require_column, text_column
from bgen.tasks.user_cells import UserCells
from data_tools.check.genes import SYMBOL_COLUMNS
from data_tools.check.labels import JOIN, Grammar, alike, read_grammar
from data_tools.check.quantities import read_quantities

LEAST_CONTROLS = 20


@dataclass(frozen=True)
class Columns:
    """How the data says what was done to a cell.

    Attributes
    ----------
    perturbation
        obs column of labels; a cell without one is left out.
    control
        The label of control cells, or several.
    dose
        obs column of doses, or None.
    strata
        obs columns within which control and perturbed cells are compared, such as cell type and batch.
    separator
        Between the names of a label; None: found by :meth:`resolved`.
    dose_unit
        Unit that doses are read in; None: found by :meth:`resolved`.
    """

    perturbation: str
    control: str | Sequence[str]
    dose: str | None = None
    strata: Sequence[str] = ()
    separator: str | None = None
    dose_unit: str | None = None

    @property
    def controls(self) -> tuple[str, ...]:
        """Labels of control cells."""
        return (self.control,) if isinstance(self.control, str) else tuple(self.control)

    @property
    def control_key(self) -> tuple[tuple[str, ...], None]:
        """What stands for a control cell among sets and doses: see :func:`bgen.tasks.perturb.held_out.screen_keys`."""
        return self.controls[:1], None

    @property
    def grammar(self) -> Grammar:
        """How labels are read."""
        return Grammar(self.controls, JOIN if self.separator is None else self.separator)

    def labels(self, adata: AnnData) -> NDArray[np.str_]:
        """Return the label of every cell ``[N]``, "" for none."""
        return text_column(adata, self.perturbation, keep=self.controls)

    def is_control(self, label: NDArray[np.str_]) -> NDArray[np.bool_]:
        """Return which of the labels ``[N]`` are of control cells."""
        grammar = self.grammar
        distinct, place = np.unique(label, return_inverse=True)
        return np.array([grammar.is_control(str(text)) for text in distinct], bool)[place]

    def resolved(self, adata: AnnData) -> Columns:
        """Return the same with the separator and the unit of doses that the data have, once for all parts of them.

        Raises
        ------
        UserError
            If a column, or one of the control labels, is not there.
        """
        known = {*adata.var_names.astype(str)}
        for column in SYMBOL_COLUMNS:
            known |= {*adata.var[column].astype(str)} if column in adata.var else set()
        label = self.labels(adata)
        for control in self.controls:
            if not (label == control).any():
                raise _no_control(label, control, self.perturbation)
        grammar = read_grammar(map(str, np.unique(label)), self.controls, self.separator, known)
        named = replace(self, separator=grammar.separator)
        if self.dose is None:
            return named
        require_column(adata, self.dose)
        perturbed = (label != "") & ~named.is_control(label)
        unit = read_quantities(adata.obs[self.dose].iloc[np.flatnonzero(perturbed)], "dose", self.dose_unit).unit
        declared = adata.uns.get("dose_unit")
        return replace(named, dose_unit=unit or (str(declared) if declared else None))

    def sentences(self, adata: AnnData) -> list[str]:
        """Say how labels and doses are understood, and what a user should know about them."""
        label = self.labels(adata)
        cells = {str(text): int(n) for text, n in zip(*np.unique(label, return_counts=True), strict=True)}
        said = [self.grammar.sentence(cells), *(f"{pair}." for pair in alike(cells))]
        if cells.get(""):
            said.append(f"{cells['']:,} cells without a label in obs['{self.perturbation}'] are left out.")
        control = self.is_control(label)
        perturbed = (label != "") & ~control
        if self.dose is not None:
            found = read_quantities(adata.obs[self.dose].iloc[np.flatnonzero(perturbed)], "dose", self.dose_unit)
            said += [found.sentence(self.dose)] if found.read else []
            if without := int(np.isnan(found.numbers).sum()):
                said.append(f"{without:,} perturbed cells have no dose in obs['{self.dose}'].")
        stratum = strata_codes(adata, self)
        alone = perturbed & ~np.isin(stratum, np.unique(stratum[control]))
        if alone.any():
            said.append(
                f"{int(alone.sum()):,} perturbed cells have no control cells with the same {', '.join(self.strata)}:"
                " they are compared with the control cells of all others, so what sets these apart counts as effect."
            )
        return said


@dataclass(frozen=True)
class Screen:
    """Control and perturbed cells.

    Attributes
    ----------
    mean, std
        ``[N, D + 1]``: whitened posterior of each cell; the log library size, last, has standard deviation 0.
    label, stratum
        int64 ``[N]``: number of the set of perturbations and dose (-1: control), and of the stratum.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    label: NDArray[np.int64]
    stratum: NDArray[np.int64]


@dataclass(frozen=True)
class ScreenData:
    """Cells in the model's genes, the screen, its labels (``members``, ``dose``), names and target genes of the P, and
    the values of the strata's columns in each stratum.
    """

    cells: MemoryCells
    screen: Screen
    labels: pd.DataFrame
    names: list[str]
    targets: NDArray[np.int64]
    strata: list[list[str]]


def read_screen(model: AnnDataModel, cells: UserCells, columns: Columns) -> ScreenData:
    """Prepare control and perturbed cells; those without a label are left out.

    Raises
    ------
    UserError
        If a column is missing, or there are too few control cells.
    """
    label = columns.labels(cells.adata)
    control = require_controls(label, columns)
    used = np.flatnonzero(label != "")
    cells, label, control = cells[used], label[used], control[used]
    adata = cells.adata
    dose = read_doses(adata, columns, label)
    members = {text: columns.grammar.members(str(text)) for text in np.unique(label)}
    sets = {JOIN.join(names): list(names) for names in members.values()}
    names = sorted({name for found in sets.values() for name in found})
    targets = find_genes(model.saved.genes, names)
    table = pd.DataFrame({"label": [JOIN.join(members[text]) for text in label], "dose": dose})
    groups = table[~control].groupby(["label", "dose"], dropna=False, sort=True)
    number = np.full(len(label), -1, np.int64)
    number[~control] = groups.ngroup()
    labels = groups.size().index.to_frame(index=False)
    labels["members"] = [sets[text] for text in labels["label"]]
    mean, std = whitened_latents(model, cells)
    stratum = strata_codes(adata, columns)
    _, firsts = np.unique(stratum, return_index=True)
    values = [text_column(adata, name)[firsts].tolist() for name in columns.strata]
    screen = Screen(mean=mean, std=std, label=number, stratum=stratum)
    strata = [[str(column[at]) for column in values] for at in range(len(firsts))]
    return ScreenData(MemoryCells(cells.counts, model.covariates(cells)), screen, labels, names, targets, strata)


def strata_codes(adata: AnnData, columns: Columns) -> NDArray[np.int64]:
    """Return the number of the stratum of every cell ``[N]``."""
    return common_strata([adata], columns)[0]


def common_strata(parts: Sequence[AnnData], columns: Columns) -> list[NDArray[np.int64]]:
    """Return the number of the stratum of every cell of several data, the same number for the same stratum."""
    if not columns.strata:
        return [np.zeros(part.n_obs, np.int64) for part in parts]
    tables = [
        pd.DataFrame({str(i): text_column(part, name) for i, name in enumerate(columns.strata)}) for part in parts
    ]
    strata = pd.concat(tables, ignore_index=True)
    codes = np.asarray(strata.groupby(list(strata)).ngroup(), np.int64)
    return np.split(codes, np.cumsum([part.n_obs for part in parts])[:-1])


def whitened_latents(model: AnnDataModel, cells: UserCells) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation ``[N, D + 1]`` of the whitened latents, log library size last."""
    mean, variance = model.encode(cells)
    library = np.maximum(np.asarray(cells.counts.sum(1)).ravel(), 1.0)
    codec = model.saved.codec
    state, size = (torch.from_numpy(of).to(codec.device) for of in (mean, np.log(library).astype(np.float32)))
    whitened: NDArray[np.float32] = codec.whiten(state, size).cpu().numpy()
    std = np.zeros_like(whitened)
    std[:, :-1] = np.sqrt(variance) / codec.latent_std[:-1].cpu().numpy()
    return whitened, std


def require_controls(label: NDArray[np.str_], columns: Columns) -> NDArray[np.bool_]:
    """Return which of the labels ``[N]`` are of control cells.

    Raises
    ------
    UserError
        If there are fewer than 20.
    """
    found, named = columns.is_control(label), "', '".join(columns.controls)
    if not found.any():
        raise _no_control(label, columns.controls[0], columns.perturbation)
    if found.sum() < LEAST_CONTROLS:
        raise UserError(
            f"obs['{columns.perturbation}'] has {found.sum()} control cells '{named}'; at least {LEAST_CONTROLS} are"
            " needed."
        )
    return found


def _no_control(label: NDArray[np.str_], control: str, column: str) -> UserError:
    there = pd.Series(label[label != ""]).value_counts()
    empty = int((label == "").sum())
    hint = f" {empty:,} cells have no value: if they are the controls, write '{control}' there." if empty else ""
    return UserError(
        f"obs['{column}'] has no control cells '{control}'.{nearest(control, list(there.index))}"
        f" Its most frequent values: {', '.join(there.index[:5])}.{hint}"
    )


def require_plain_counts(codec: Codec) -> None:
    """Check that a codec can be the base of a perturbation flow."""
    if isinstance(codec, VAE) and codec.config.likelihood != "nb":
        raise UserError("Perturbations are predicted on a VAE with vae.likelihood=nb; this one is zero-inflated.")


def read_doses(adata: AnnData, columns: Columns, label: NDArray[np.str_]) -> NDArray[np.float64]:
    """Return the dose of every perturbed cell ``[N]`` in ``columns.dose_unit``; NaN for none, and for other cells.

    ``label`` is that of every cell.

    Raises
    ------
    UserError
        If there is no such column, or a dose of a perturbed cell cannot be read, is negative or infinite.
    """
    doses = np.full(len(label), np.nan)
    if columns.dose is None:
        return doses
    require_column(adata, columns.dose)
    rows = np.flatnonzero((label != "") & ~columns.is_control(label))
    found = read_quantities(adata.obs[columns.dose].iloc[rows], "dose", columns.dose_unit)
    if found.wrong:
        raise UserError(
            f"obs['{columns.dose}'] holds doses of perturbed cells that cannot be read: {found.complaint()}. Write"
            " numbers in one unit, or texts such as '10 uM'; leave cells without a dose empty."
        )
    doses[rows] = found.numbers
    wrong = np.isinf(doses) | (doses < 0)
    if wrong.any():
        raise UserError(
            f"obs['{columns.dose}'] holds {doses[wrong][0]:g} for {int(wrong.sum()):,} perturbed cells: a dose is 0 or"
            " a positive number."
        )
    if len(rows) and np.isnan(doses).all():
        raise UserError(f"obs['{columns.dose}'] holds no dose of any perturbed cell: a dose is a number in one unit.")
    return doses
