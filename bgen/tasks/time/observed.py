"""A user's time course as the model sees it, and what is asked of it.

Axes: n cells, G genes, D latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError, nearest
from bgen.hub.directory import SavedModel
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.columns import as_text
from bgen.tasks.generate import asked_number
from bgen.tasks.time.axis import TimeAxis
from bgen.tasks.user_cells import UserCells
from data_tools.check.quantities import read_quantities


@dataclass(frozen=True)
class Systems:
    """What forms a trajectory of its own in the user's data.

    Attributes
    ----------
    code
        Number of each cell's system ``[n]``.
    labels
        System column to the value of each system, in the order of the numbers.
    """

    code: I64
    labels: dict[str, list[str]]

    @classmethod
    def of(cls, adata: AnnData, columns: Sequence[str]) -> Systems:
        """Group cells by those of the columns that the data have; without any, all cells are one system."""
        there = [name for name in columns if name in adata.obs]
        if not there:
            return cls(np.zeros(adata.n_obs, np.int64), {})
        table = adata.obs[there].astype(str)
        code, values = pd.factorize(pd.MultiIndex.from_frame(table))
        return cls(code, {name: [str(value[i]) for value in values] for i, name in enumerate(there)})


@dataclass(frozen=True)
class Observed:
    """The user's cells as the model sees them.

    Attributes
    ----------
    counts
        CSR ``[n, G]``, the model's genes.
    mean, variance
        Of the latent states, ``[n, D]``.
    time
        ``[n]``, in the model's unit.
    columns
        Conditions and covariates that the model knows and the data have: codes (-1 = unknown) or numbers ``[n]``.
    systems
        Which cells form a trajectory.
    """

    counts: sp.csr_matrix
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    time: NDArray[np.float64]
    columns: dict[str, NDArray[Any]]
    systems: Systems

    @property
    def system(self) -> I64:
        """Number of each cell's system ``[n]``."""
        return self.systems.code


@dataclass(frozen=True)
class Task:
    """One system and time asked for: rows of the observed cells by time point, ascending, and how many to generate."""

    system: int
    time: float
    context: dict[float, I64]
    n: int

    def side(self, after: bool) -> list[float]:
        """Return the observed times before (nearest last) or after (nearest first) the time asked for."""
        return [time for time in self.context if (time > self.time) == after]

    @property
    def share(self) -> float:
        """How much of the way from the previous to the next time point lies behind the time asked for."""
        low, high = self.side(False)[-1], self.side(True)[0]
        return (self.time - low) / (high - low)


def observe(model: AnnDataModel, cells: UserCells, where: Mapping[str, Any], time_column: str | None) -> Observed:
    """Return the cells that agree with ``where`` as a model of trajectories sees them.

    Raises
    ------
    UserError
        If a condition is unknown to the model, no cell agrees, or the times cannot be read (:func:`read_times`).
    """
    axis = TimeAxis.of(model.saved)
    cells = select_cells(model.saved, cells, where)
    mean, variance = model.encode(cells)
    return Observed(
        counts=cells.counts,
        mean=mean,
        variance=variance,
        time=read_times(cells.adata, axis, time_column),
        columns={name: values for name, values in cells.columns.items() if name != axis.column},
        systems=Systems.of(cells.adata, axis.system),
    )


def select_cells(model: SavedModel, cells: UserCells, where: Mapping[str, Any]) -> UserCells:
    """Return the cells that agree with ``where`` in the columns that the data have.

    Raises
    ------
    UserError
        If a condition is unknown to the model, or no cell agrees.
    """
    keep = np.ones(len(cells), bool)
    for given, value in where.items():
        name = model.column_name(given)
        there = cells.matched.columns.get(name)
        if there is None:
            continue
        column = cells.adata.obs[there]
        if model.columns[name].kind == "category":
            keep &= (as_text(column) == str(value)).to_numpy()
        else:
            keep &= np.isclose(cells.columns[name], asked_number(model, given, value))
        if not keep.any():
            raise UserError(
                f"No cell of the data has {given}={value}.{nearest(str(value), column.astype(str).unique())}"
            )
    return cells if keep.all() else cells[keep]


def read_times(adata: AnnData, axis: TimeAxis, column: str | None) -> NDArray[np.float64]:
    """Return the time of each cell ``[n]`` of the user's data.

    Raises
    ------
    UserError
        If there is no such column, it is no number, is missing for some cells, or has another unit.
    """
    choices = [column] if column else [axis.column, "time"]
    name = next((choice for choice in choices if choice in adata.obs), None)
    if name is None:
        raise UserError(
            f"The data have no time: obs has no column '{choices[0]}'.{nearest(choices[0], adata.obs.columns)}"
            " Name the column with --time-column."
        )
    found = read_quantities(adata.obs[name], "time", axis.unit or None)
    values = found.numbers
    if not np.isfinite(values).all():
        wrong = f" ({found.complaint()})" if found.wrong else ""
        raise UserError(
            f"obs['{name}'] holds no number for {int((~np.isfinite(values)).sum()):,} of {adata.n_obs:,} cells{wrong}:"
            f" give each its time{f' in {axis.unit}' if axis.unit else ''}, or remove those cells."
        )
    unit = adata.uns.get("time_unit")
    if not found.read and unit and axis.unit and str(unit) != axis.unit:
        raise UserError(f"The data's times are in {unit} (uns['time_unit']), the model's in {axis.unit}. Convert them.")
    return values
