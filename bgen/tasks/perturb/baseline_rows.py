"""Which baselines there are for a held-out perturbation, and what each of them predicts.

Axes: N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.arrays import F64, I64
from bgen.effects.contexts import Contexts, Key, context_effects, read_contexts
from bgen.evaluate.metrics.space import fit_space
from bgen.genes.expression import log_cp10k
from bgen.genes.sets import GeneSets
from bgen.tasks.columns import text_column
from bgen.tasks.perturb.baselines import (
    ADDITIVE,
    AVERAGE_DOSE,
    GENE_SETS,
    LATENT_SHIFT,
    NEAREST_DOSE,
    SAME,
    SHIFT_COMPONENTS,
    TRAIN_MEAN,
    WEIGHTED_MEAN,
    TrainedEffects,
    additive,
    average_dose,
    gene_set_ridge,
    latent_shift,
    mean_effect,
    measure_effects,
    nearest_dose,
    target_genes,
    with_own,
)
from bgen.tasks.perturb.keys import ScreenKeys
from bgen.tasks.perturb.screen import LEAST_CONTROLS, Columns, strata_codes

LEAST_CELLS = 10
"""Cells of a perturbation in a context, below which its effect there says nothing."""


@dataclass(frozen=True)
class BaselineRows:
    """Baselines from the training cells.

    Attributes
    ----------
    adata, counts
        The training cells, and their counts ``[N, G]`` of the model's genes.
    keys, columns
        What was done to each, and the columns that say so.
    genes
        Gene table of the model.
    contexts
        obs columns of what a held-out group may differ in, such as the cell type.
    sets
        Gene sets, if a file was given.
    """

    adata: AnnData
    counts: sp.csr_matrix
    keys: ScreenKeys
    columns: Columns
    genes: pd.DataFrame
    contexts: Sequence[str] = ()
    sets: GeneSets | None = None

    @cached_property
    def groups(self) -> dict[Key, I64]:
        """Training cells of every set and dose."""
        return self.keys.perturbed()

    @cached_property
    def logs(self) -> sp.csr_matrix:
        """Log(1 + counts per 10,000) of the training cells ``[N, G]``."""
        return log_cp10k(self.counts)

    @cached_property
    def control(self) -> I64:
        """Numbers of the control cells."""
        return self.keys.rows(self.columns.control_key)

    @cached_property
    def stratum(self) -> I64:
        """Stratum of every training cell."""
        return strata_codes(self.adata, self.columns)

    @cached_property
    def trained(self) -> TrainedEffects:
        """Effects of everything that was trained on."""
        keys = list(self.groups)
        rows = [self.groups[key] for key in keys]
        values = measure_effects(self.logs, rows, self.control, self.stratum)
        return TrainedEffects(keys, values, np.array([len(some) for some in rows]), target_genes(keys, self.genes))

    def rows(self, key: Key, targets: I64, control: F64) -> dict[str, F64]:
        """Return the effects ``[G]`` of every baseline that there is for a held-out set and dose.

        ``targets``: its target genes; ``control [G]``: mean logarithm of the control cells that it is predicted from.
        """
        found: dict[str, F64 | None] = {}
        if any(other[0] != key[0] for other in self.groups):
            for name, by_cells in ((TRAIN_MEAN, False), (WEIGHTED_MEAN, True)):
                mean, own = mean_effect(self.trained, by_cells=by_cells)
                found[name] = with_own(mean, targets, own)
        if key in self.groups:  # held out are other cells of it
            found[SAME] = self.trained.of(key)
            found[LATENT_SHIFT] = latent_shift(self.logs, self.groups[key], self.control, self.stratum, self._axes)
            if self._contexts is not None:
                found |= context_effects(self._contexts, control, [key]).get(key, {})
        else:
            near = nearest_dose(key, self.groups)
            found[NEAREST_DOSE] = None if near is None else self.trained.of(near)
            found[AVERAGE_DOSE] = average_dose(key, self.trained)
            found[ADDITIVE] = additive(key, self.trained)
            found[GENE_SETS] = self._from_gene_sets(key, targets)
        return {name: effect for name, effect in found.items() if effect is not None}

    def cells(self, key: Key) -> dict[str, I64]:
        """Return the training cells that baselines for a dose consist of."""
        near = nearest_dose(key, self.groups)
        own = [rows for other, rows in self.groups.items() if other[0] == key[0] and other[1] and other != key]
        found: dict[str, I64] = {}
        if any(other[0] != key[0] for other in self.groups):
            found |= dict.fromkeys((TRAIN_MEAN, WEIGHTED_MEAN), np.concatenate(list(self.groups.values())))
        if near is not None:
            found[NEAREST_DOSE] = self.groups[near]
        if own:
            found[AVERAGE_DOSE] = np.concatenate(own)
        return found

    @cached_property
    def _axes(self) -> NDArray[np.float32]:
        return fit_space(self.counts, SHIFT_COMPONENTS).components

    @cached_property
    def _contexts(self) -> Contexts | None:
        """Training contexts with enough control cells, if there are at least two."""
        if not self.contexts:
            return None
        named = np.all([text_column(self.adata, name) != "" for name in self.contexts], axis=0)
        context = strata_codes(self.adata, replace(self.columns, strata=self.contexts))
        means: dict[int, F64] = {}
        effects: dict[int, dict[Key, F64]] = {}
        for number in np.unique(context[named]).tolist():
            here = context == number
            control = self.control[here[self.control]]
            groups = {key: rows[here[rows]] for key, rows in self.groups.items()}
            groups = {key: rows for key, rows in groups.items() if len(rows) >= LEAST_CELLS}
            if len(control) >= LEAST_CONTROLS and groups:
                means[number] = np.asarray(self.logs[control].mean(0, dtype=np.float64)).ravel()
                values = measure_effects(self.logs, list(groups.values()), control, self.stratum)
                effects[number] = dict(zip(groups, values, strict=True))
        return read_contexts(means, effects) if len(means) > 1 else None

    def _from_gene_sets(self, key: Key, targets: I64) -> F64 | None:
        if self.sets is None or len(key[0]) > 1 or key[1] is not None:
            return None
        trained = self.trained.some([len(other[0]) == 1 and other[1] is None for other in self.trained.keys])
        rows = self.sets.rows([one[0][0] for one in (*trained.keys, key)])
        effect = gene_set_ridge(trained, rows[:-1], rows[-1])
        return None if effect is None else with_own(effect, targets, mean_effect(trained, by_cells=True)[1])
