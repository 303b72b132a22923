"""Cells of a store, read a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.data.loader import CountReader
from bgen.hub.directory import SavedModel
from bgen.names import index_name, keys
from bgen.store.store import Store
from bgen.tasks.blocks.cells import BlockCells
from bgen.tasks.blocks.folder import Writer, add_array, add_categories, add_strings
from bgen.tasks.columns import as_labels, match_columns, role_column
from bgen.tasks.user_cells import Reading
from data_tools.check.genes import resolve_genes

READ = 4_096
"""Cells that are read at once."""


class StoreCells(BlockCells):
    """Cells of a store.

    Parameters
    ----------
    store
        The store.
    saved, expected
        The model, and the share that it expects of each gene in an average cell's counts ``[G]``.
    reading
        Of :class:`bgen.tasks.user_cells.Reading`; only ``floor`` has a meaning.

    Raises
    ------
    UserError
        If it has too few of the model's genes.
    """

    def __init__(self, store: Store, saved: SavedModel, expected: NDArray[np.float32], reading: Reading) -> None:
        self._store, self._reader = store, CountReader(store)
        self._index = index_name("cell", store.manifest.columns) or "_index"
        var = store.genes.set_index("id")
        genes = resolve_genes(var, None, "sum", accept_unnamed=True)
        self._match(saved, expected, genes, var, reading)
        self._codes: dict[str, tuple[str, NDArray[np.int64]]] = {}
        where = {}
        there = pd.DataFrame(columns=list(store.manifest.columns))
        for name, info in saved.columns.items():
            if (column := role_column(there, name, info)) is None:
                continue
            where[name] = column
            if name in saved.codec.covariates:
                about = store.manifest.columns[column]
                values = about.categories if about.kind == "category" else store.column(column)[1]
                found, *_ = match_columns(pd.DataFrame({column: values}), {name: info}, saved.about.units)
                self._codes[name] = (
                    column,
                    np.append(found[name], -1),
                )  # -1 for a cell without a value, in the store too
        self._say(saved, "X", genes, where, ())

    def __len__(self) -> int:
        return len(self._store)

    @property
    def columns(self) -> list[str]:
        """See :class:`BlockCells`."""
        return list(self._store.manifest.columns)

    def codes(self, name: str, start: int, stop: int) -> NDArray[np.int64]:
        """See :class:`BlockCells`."""
        if name not in self._codes:
            return np.full(stop - start, -1)
        column, codes = self._codes[name]
        about = self._store.manifest.columns[column]
        return codes[self._store.column(column, (start, stop))[1] if about.kind == "category" else slice(start, stop)]

    def texts(self, column: str, start: int, stop: int) -> NDArray[np.str_]:
        """See :class:`BlockCells`."""
        about, values = self._store.column(column, (start, stop))
        if about.kind == "number":
            return as_labels(pd.Series(values))
        known = as_labels(pd.Series(about.categories, dtype=object))
        return np.append(known, "")[values]  # -1, which is no value, is the last

    def write_frame(self, group: Any, rows: int) -> None:
        """See :class:`BlockCells`."""
        store, n = self._store, len(self)
        names = self._names()
        obs = group.create_group("obs")
        obs.attrs.update(
            {
                "encoding-type": "dataframe",
                "encoding-version": "0.2.0",
                "_index": self._index,
                "column-order": list(names.values()),
            }
        )
        add_strings(obs, self._index, n, rows)
        for column, name in names.items():
            about = store.manifest.columns.get(column)
            if about is not None and about.kind == "number":
                add_array(obs, name, (n,), store.column(column, (0, 1))[1].dtype, rows)
            else:
                add_categories(obs, name, n, rows, list(store.manifest.splits) if about is None else about.categories)

    def write_rows(self, writer: Writer, start: int, stop: int) -> None:
        """See :class:`BlockCells`."""
        store, rows = self._store, (start, stop)
        writer.write(f"obs/{self._index}", start, store.names(rows).astype(object))
        for column, name in self._names().items():
            values = store.column(column, rows)[1] if column in store.manifest.columns else store.rows("split", rows)
            writer.write(f"obs/{name}", start, values)

    def take(self, cells: I64) -> sp.csr_matrix:
        """See :class:`BlockCells`."""
        return self._by_gene(self._read(cells))[0]

    def _pieces(self, start: int, stop: int) -> Iterator[sp.csr_matrix]:
        for first in range(start, stop, READ):
            yield self._read(np.arange(first, min(first + READ, stop)))

    def _read(self, cells: I64) -> sp.csr_matrix:
        batch = self._reader.read_cells(cells)
        arrays = (batch.counts.numpy(), batch.indices.numpy(), batch.indptr.numpy())
        return sp.csr_matrix(arrays, shape=(len(cells), batch.n_genes))

    def _names(self) -> dict[str, str]:
        """Return the columns of the store, and the split, under names that can be written."""
        columns = self._store.manifest.columns
        return keys([*columns, *(["split"] if "split" not in columns else [])])
