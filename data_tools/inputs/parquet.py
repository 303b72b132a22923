"""Parquet files of cells as lists of expressed genes, as Tahoe-100M is published (extra ``parquet``).

A row is a cell: ``genes``, a list of gene tokens, ``expressions``, a list of as many counts, and columns of what is
known of the cell. What a token is says a second table, ``gene_metadata.parquet`` (token_id, ensembl_id, gene_symbol),
which lies beside the files or in a folder ``metadata`` above them. A list may begin with a marker: a token that is no
gene, with a negative count; it is left out.

Axes: N cells of the file, G genes of the second table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.errors import UserError
from data_tools.inputs.source import Matrix, Source

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

GENES, COUNTS = "genes", "expressions"
TABLE = "gene_metadata.parquet"
TOKEN, ID, SYMBOL = "token_id", "ensembl_id", "gene_symbol"
BARCODES = ("BARCODE_SUB_LIB_ID", "barcode", "cell_id")
"""Columns that name cells; the first of them that a file has becomes the index."""

MOST_TOKEN = 10_000_000
MOST_BYTES = 4 << 30
"""Bytes of a row group, unpacked, at most."""


@dataclass
class ParquetSource(Source):
    """A parquet file of cells; ``column [tokens]`` is the gene of each token, -1 for none."""

    column: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        first = 0
        with _opened(self.path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                low, high = max(start - first, 0), min(stop - first, rows)
                if low < high:
                    cells = self._cells(
                        file.read_row_group(group, columns=[GENES, COUNTS]), self.matrices[name].shape[1]
                    )
                    for at in range(low, high, step):
                        yield first + at, cells[at : min(at + step, high)]
                first += rows

    def _cells(self, table: pa.Table, n_genes: int) -> sp.csr_matrix:
        """Return the cells of a row group, ``[N, G]``."""
        (tokens, ends), (counts, of_counts) = (_lists(table, name) for name in (GENES, COUNTS))
        if not np.array_equal(ends, of_counts):
            raise UserError(f"{self.path}: in some cell, {GENES} and {COUNTS} are lists of different lengths.")
        known = (tokens >= 0) & (tokens < len(self.column))
        genes = np.where(known, self.column[np.where(known, tokens, 0)], -1)
        marker = (genes < 0) & (counts < 0)
        if (genes[~marker] < 0).any():
            token = int(tokens[~marker][genes[~marker] < 0][0])
            raise UserError(f"{self.path}: token {token} is no gene of {TABLE}. Are they of the same release?")
        before = np.concatenate(([0], np.cumsum(~marker)))
        shape = (len(ends) - 1, n_genes)
        return sp.csr_matrix((counts[~marker].astype(np.float32), genes[~marker], before[ends]), shape=shape)


def is_parquet(path: Path) -> bool:
    """Whether this is a parquet file, or a folder of them."""
    if path.is_dir():
        return bool(_files(path))
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def members_of_parquet(path: Path) -> list[Path]:
    """Return the files of cells in a folder, or in its folder ``data``."""
    return _files(path) if path.is_dir() else [path]


def open_parquet(path: Path) -> Source:
    """Open a parquet file of cells and the table of its genes.

    Raises
    ------
    UserError
        If pyarrow is not installed, a column or the table of genes is missing, or a token comes twice.
    """
    if path.is_dir():
        raise UserError(f"{path}: holds {len(_files(path))} parquet files. Give one of them.")
    genes = _genes(path)
    with _opened(path) as file:
        if wrong := [name for name in (GENES, COUNTS) if name not in file.schema_arrow.names]:
            raise UserError(
                f"{path}: a parquet file of cells has the columns {GENES} and {COUNTS} (lists). {wrong[0]} is missing;"
                f" there are: {', '.join(file.schema_arrow.names[:12])}."
            )
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        if any(group.total_byte_size > MOST_BYTES for group in groups):
            raise UserError(f"{path}: a row group unpacks to over {MOST_BYTES >> 30} GiB. Write it in smaller groups.")
        lists = file.schema_arrow.names.index(COUNTS)
        columns = [name for name in file.schema_arrow.names if name not in (GENES, COUNTS)]
        obs = file.read(columns=columns).to_pandas().reset_index(drop=True)
        stored = sum(_values(group, lists) for group in groups)
        cells = file.metadata.num_rows
    obs = obs.reindex(range(cells))
    name = next((name for name in BARCODES if name in obs), None)
    obs.index = pd.Index(obs.pop(name).astype(str) if name else [f"cell_{row}" for row in range(cells)], name=None)
    tokens = genes[TOKEN].to_numpy(np.int64)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < MOST_TOKEN:
        raise UserError(f"{TABLE} of {path}: tokens must be between 0 and {MOST_TOKEN:,}.")
    column = np.full(int(tokens.max(initial=-1)) + 1, -1, np.int32)
    column[tokens] = np.arange(len(tokens))
    var = pd.DataFrame({"symbol": genes[SYMBOL].astype(str).to_numpy()} if SYMBOL in genes else {})
    var.index = pd.Index(genes[ID].astype(str).to_numpy())
    about = Matrix((cells, len(var)), np.dtype(np.float32), "csr", stored)
    return ParquetSource(path, "parquet", obs, {"X": var}, {"X": about}, column=column)


def _files(folder: Path) -> list[Path]:
    for place in (folder, folder / "data"):
        found = sorted(file for file in place.glob("*.parquet") if file.name != TABLE and file.is_file())
        if found:
            return found
    return []


def _opened(path: Path) -> pq.ParquetFile:
    try:
        import pyarrow.parquet as pq  # an extra
    except ModuleNotFoundError:
        raise UserError(f"{path}: parquet files need pyarrow: pip install 'bgen-flow[parquet]'.") from None
    return pq.ParquetFile(path)


def _genes(path: Path) -> pd.DataFrame:
    """Return the table of genes that lies beside a file of cells, or above it."""
    around = [path.parent, path.parent / "metadata", path.parent.parent / "metadata", path.parent.parent]
    found = next((folder / TABLE for folder in around if (folder / TABLE).is_file()), None)
    if found is None:
        raise UserError(
            f"{path}: there is no {TABLE}, which says what the tokens are. Put it beside the file, or into a folder"
            " metadata beside its folder, as it is published."
        )
    with _opened(found) as file:
        table = file.read().to_pandas()
    for name in (TOKEN, ID):
        if name not in table:
            raise UserError(f"{found}: has no column {name}; there are: {', '.join(map(str, table.columns[:12]))}.")
    for name in (TOKEN, ID):
        if table[name].isna().any() or table[name].duplicated().any():
            raise UserError(f"{found}: in {name} there are gaps, or some value comes twice.")
    return table


def _lists(table: pa.Table, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the values of a column of lists, one after another, and where each list begins, ``[N + 1]``."""
    import pyarrow as pa  # an extra

    lists = table.column(name).combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], table.schema.field(name).type)
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise UserError(f"The column {name} holds {lists.type}, not lists.")
    values = lists.flatten()
    if lists.null_count or values.null_count:
        raise UserError(f"The column {name} has gaps.")
    ends = np.asarray(lists.offsets, np.int64)
    return values.to_numpy(zero_copy_only=False), ends - ends[0]


def _values(group: Any, column: int) -> int:
    """Return the values of a column of lists in a row group, markers with them."""
    return int(group.column(column).num_values)
