"""Cells that a verb is given to read a block at a time, before they are matched to a model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bgen.errors import UserError
from bgen.hub.directory import SavedModel
from bgen.store.open import is_store, open_store
from bgen.store.store import Store
from bgen.tasks.blocks.cells import BlockCells
from bgen.tasks.blocks.file_cells import FileCells
from bgen.tasks.blocks.store_cells import StoreCells
from bgen.tasks.user_cells import FoundCounts, Reading, find_counts
from data_tools.check.findings import Rounding
from data_tools.check.genes import resolve_genes
from data_tools.inputs.fetch import on_this_machine
from data_tools.inputs.registry import open_source
from data_tools.inputs.source import Source


@dataclass(frozen=True)
class Opened:
    """Cells that are named and open, not yet matched to a model: a store, or a file or folder."""

    cells: Store | Source
    reading: Reading

    @classmethod
    def of(cls, data: str | os.PathLike[str], reading: Reading) -> Opened:
        """Open cells.

        Raises
        ------
        UserError
            If there are none, or they are a store and an option of files is given.
        """
        access = reading.get("access")
        if not is_store(data, access):
            return cls(open_source(on_this_machine(data, access)), reading)
        if given := [name for name in ("counts", "layer", "gene_column") if reading.get(name) is not None]:
            option = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{os.fspath(data)} is a store, which knows its counts and genes: leave out {option}.")
        return cls(open_store(data, access=access), reading)

    def state(self) -> dict[str, str]:
        """Return what tells these cells, and how they are read, from others."""
        given = {name: str(value) for name, value in self.reading.items() if value is not None and name != "access"}
        if isinstance(self.cells, Store):
            return {"the cells": self.cells.fingerprint, **given}
        return {"the cells": json.dumps(self.cells.state()), **given}

    def find_counts(self) -> tuple[str, Rounding] | None:
        """Return the matrix with the counts, and how they become integers; of a file all values are read for that.

        Raises
        ------
        UserError
            If it has none.
        """
        if isinstance(self.cells, Store):
            return None
        given = {name: self.reading.get(name) for name in ("counts", "layer", "gene_column")}
        found = find_counts(self.cells, **given)  # type: ignore[arg-type]
        return found.matrix, found.rounding

    def match(self, found: tuple[str, Rounding] | None, saved: SavedModel, expected: NDArray[np.float32]) -> BlockCells:
        """Return the cells, matched to a model; ``found`` is from :meth:`find_counts`."""
        if isinstance(self.cells, Store):
            return StoreCells(self.cells, saved, expected, self.reading)
        assert found is not None, "of a file it is known"
        matrix, rounding = found
        genes = resolve_genes(self.cells.var(matrix), self.reading.get("gene_column"), "sum", accept_unnamed=True)
        return FileCells(self.cells, FoundCounts(matrix, rounding, genes), saved, expected, self.reading)
