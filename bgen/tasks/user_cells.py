"""A user's cells as every verb takes them: read once, by the readers and the rules of ``bgen data check``.

A file of any format, or AnnData in memory, becomes :class:`UserData` (its counts are found and its genes known), and
that becomes :class:`UserCells` once it is matched to what a model knows.

Axes: N cells, V genes of the data, G genes of the model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypedDict

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.config.data import Access
from bgen.data.as_anndata import read_anndata
from bgen.errors import UserError, nearest, require_number
from bgen.genes.table import WAYS
from bgen.hub.directory import ColumnInfo
from bgen.memory import free_memory
from bgen.store.open import is_store, open_store
from bgen.tasks.columns import match_columns
from bgen.tasks.gene_match import FLOOR, by_gene, match_genes, too_few
from data_tools.check.counts import advice
from data_tools.check.findings import Rounding
from data_tools.check.genes import Genes, resolve_genes
from data_tools.check.look import counts_elsewhere, look
from data_tools.inputs.fetch import on_this_machine
from data_tools.inputs.registry import open_source
from data_tools.inputs.source import Source

FEW_MOLECULES = 0.1
"""Share of an average cell's molecules that genes missing from the data may hold without a warning."""

ALL = 0.995
"""From this share on, all molecules count as known."""

Cells: TypeAlias = str | os.PathLike[str] | AnnData
"""A file or folder of cells, a store (its folder or address), or AnnData in memory."""


class Reading(TypedDict, total=False):
    """How cells are read: keyword arguments of every verb.

    Attributes
    ----------
    counts
        Matrix of raw counts: "X" (the default), "raw/X", "layers/NAME", or "auto" for the first that is counts.
    gene_column
        Column of var with the gene ids; default: its index.
    floor
        Least share of the molecules of an average cell of the model that must be of genes that the data has; default
        0.8.
    layer
        ``layer="NAME"`` is ``counts="layers/NAME"``.
    access
        How an address is read.
    """

    counts: str | None
    gene_column: str | None
    floor: float | None
    layer: str | None
    access: Access | None


@dataclass(frozen=True)
class Matched:
    """What of a user's cells a model knows, and what it does not.

    Attributes
    ----------
    matrix, rounding
        Matrix that holds the counts, and how its values became integers: "none" (they were) or "nearest".
    way
        How genes were matched, one of :data:`bgen.genes.table.WAYS`.
    genes, missing
        Number of the model's genes that the data has, and ids of those that it lacks.
    unknown
        Ids of the data's genes that the model does not know.
    repeated
        How many columns of the data repeat the gene of an earlier one; their counts are added up.
    molecules
        Share of the data's counts that are of genes that the model knows.
    missing_molecules
        Share of an average cell's molecules that are of genes that the data lacks, as the model expects them.
    columns
        Columns that the model knows to the obs columns that have them, by name or by role.
    absent
        Columns that the model knows and obs lacks.
    values
        Columns that the model knows to the values in obs that it does not know, and how many cells have each.
    notes
        What was understood of a file that is unusual, a sentence each.
    """

    matrix: str
    rounding: Rounding
    way: str
    genes: int
    missing: list[str]
    unknown: list[str]
    repeated: int
    molecules: float
    missing_molecules: float
    columns: dict[str, str]
    absent: list[str]
    values: dict[str, dict[str, int]]
    notes: tuple[str, ...] = ()

    def sentences(self, *, values: bool = True) -> list[str]:
        """Say what was matched, and what a user should know about the rest; ``values``: also values of columns."""
        total = self.genes + len(self.missing)
        said = [
            *self.notes,
            f"{self.genes:,} of the model's {total:,} genes are in the data ({self.genes / total:.0%}).",
        ]
        if self.matrix != "X":
            said.append(f"The counts are those of {self.matrix}.")
        if self.rounding == "nearest":
            said.append(f"The values of {self.matrix} differ from integers by numerical noise, and are rounded.")
        if self.way != WAYS[0]:
            said.append(f"Genes are matched by their {self.way}.")
        if self.repeated:
            said.append(
                f"{self.repeated:,} columns are of a gene that another column is of: their counts are added up."
            )
        if self.molecules < ALL:
            said.append(f"Genes that the model knows hold {self.molecules:.0%} of the data's molecules.")
        if self.missing_molecules > FEW_MOLECULES:
            said.append(
                f"The genes that the data lacks hold about {self.missing_molecules:.0%} of the molecules of an average"
                " cell of the model: do not rely on what it makes of such cells without a test."
            )
        for name, cells in self.values.items() if values else ():
            shown = [f"{value} ({n:,})" for value, n in cells.items()]
            some = f"{', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}"
            said.append(f"obs['{self.columns[name]}'] has values that the model does not know: {some} cells.")
        return said

    def as_json(self) -> dict[str, Any]:
        """Return what JSON can hold, long lists as their length."""
        return {
            "matrix": self.matrix,
            "rounding": self.rounding,
            "genes": self.genes,
            "genes_missing": len(self.missing),
            "genes_unknown": len(self.unknown),
            "matched_by": self.way,
            "molecules": self.molecules,
            "missing_molecules": self.missing_molecules,
            "columns": self.columns,
            "absent": self.absent,
            "unknown_values": self.values,
        }


@dataclass(frozen=True, eq=False)
class UserData:
    """A user's cells whose counts are found and whose genes are known, not yet matched to a model.

    Attributes
    ----------
    adata
        All that the user gave.
    matrix, rounding
        Matrix that holds the counts, and how its values become integers.
    genes
        Which gene each column of that matrix is.
    gene_column, floor
        As in :class:`Reading`.
    notes
        As in :class:`Matched`.
    """

    adata: AnnData
    matrix: str
    rounding: Rounding
    genes: Genes
    gene_column: str | None
    floor: float
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.adata.n_obs)

    def __getitem__(self, rows: NDArray[Any]) -> UserData:
        return replace(self, adata=self.adata[rows])

    def match(
        self,
        genes: pd.DataFrame,
        columns: Mapping[str, ColumnInfo],
        expected: NDArray[np.float32] | None = None,
        units: Mapping[str, str] | None = None,
    ) -> UserCells:
        """Match the cells to a model's gene table and columns.

        Parameters
        ----------
        genes, columns
            What the model knows.
        expected
            ``[G]``: the share of an average cell's molecules that the model expects of each gene; None: all the same.
        units
            Unit of the model's times and doses, by role.

        Raises
        ------
        UserError
            If the genes that are there hold less than the share ``floor`` of an average cell's molecules, or if no cell
            has a count of them.
        """
        match = match_genes(genes, self.genes, self.floor, expected)
        counts, total = self._counts(match.of_column, len(genes))
        molecules = float(counts.sum(dtype=np.float64) / max(total, 1.0))
        if match.held < self.floor or not match.known.any():
            raise too_few(
                genes,
                self.genes,
                open_source(self.adata).var(self.matrix),
                match,
                expected,
                floor=self.floor,
                gene_column=self.gene_column,
                molecules=molecules,
            )
        if not counts.nnz:
            raise UserError(
                f"No cell has a count of a gene that the model knows: {self.matrix} holds {total:,.0f} molecules. Is it"
                " the matrix of counts (--counts)?"
            )
        found, where, values, read = match_columns(self.adata.obs, columns, units or {})
        matched = Matched(
            matrix=self.matrix,
            rounding=self.rounding,
            way=match.way,
            genes=match.enough,
            missing=genes["id"][~match.known].tolist(),
            unknown=self.genes.ids[match.places < 0].tolist(),
            repeated=int((match.of_column >= 0).sum() - match.enough),
            molecules=molecules,
            missing_molecules=0.0 if expected is None else max(0.0, 1.0 - match.held),
            columns=where,
            absent=[name for name in columns if name not in where],
            values=values,
            notes=(*self.notes, *read),
        )
        of_var = self._of_var(match.places, match.of_column)
        return UserCells(self, genes["id"].tolist(), counts, found, match.known, of_var, matched)

    def totals(self) -> NDArray[np.float32]:
        """Return the sum of all counts of each distinct gene of the data."""
        counts, _ = self._counts(self.genes.gene_map, len(self.genes.ids))
        return np.asarray(counts.sum(0), np.float32).ravel()

    def _counts(self, of_column: I64, n_genes: int) -> tuple[sp.csr_matrix, float]:
        """Return the counts ``[N, n_genes]`` of columns by gene (-1: left out), and the sum of all counts."""
        source = open_source(self.adata)
        named = self.genes.gene_map >= 0
        blocks, total = [], 0.0
        for _, block in source.iterate(self.matrix):
            some, sum_of_block = by_gene(block, of_column, n_genes, self.rounding, named)
            total += sum_of_block
            blocks.append(some)
        return (blocks[0] if len(blocks) == 1 else sp.vstack(blocks, format="csr")), total

    def _of_var(self, places: I64, of_column: I64) -> I64:
        """Return the model's gene that each gene of ``adata.var`` is ``[V]``, -1 for none."""
        if self.matrix != "raw/X":
            return of_column
        column = self.gene_column if self.gene_column in self.adata.var else None
        own = resolve_genes(self.adata.var, column, "sum", accept_unnamed=True)
        at = pd.Series(places, index=self.genes.ids).reindex(own.ids).fillna(-1).to_numpy(np.int64)
        return np.append(at, -1)[own.gene_map]


@dataclass(frozen=True, eq=False)
class UserCells:
    """A user's cells, matched to a model: what every verb takes.

    Attributes
    ----------
    data
        What they were read from; ``adata`` holds all that the user gave, and results are copies of it.
    genes
        Ids of the model's genes.
    counts
        CSR float32 ``[N, G]``, sorted, without stored zeros; genes that the data lacks are 0.
    columns
        Columns that the model knows and the data has: codes (int64, -1 = unknown) or numbers (float32) ``[N]``.
    known
        Which of the model's genes the data has ``[G]``.
    of_var
        The model's gene that each gene of ``adata.var`` is ``[V]``, -1 for none.
    matched
        What was matched and what was not, over all cells that were read.
    """

    data: UserData
    genes: list[str]
    counts: sp.csr_matrix
    columns: dict[str, NDArray[Any]]
    known: NDArray[np.bool_]
    of_var: I64
    matched: Matched

    @property
    def adata(self) -> AnnData:
        """All that the user gave."""
        return self.data.adata

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def __getitem__(self, rows: NDArray[Any]) -> UserCells:
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, data=self.data[rows], counts=self.counts[rows], columns=columns)

    def with_columns(self, columns: Mapping[str, ColumnInfo], units: Mapping[str, str] | None = None) -> UserCells:
        """Return the cells with their columns matched to others, of a model with the same genes."""
        return replace(self, columns=match_columns(self.adata.obs, columns, units or {})[0])

    def copy(self) -> AnnData:
        """Return a copy of all that the user gave."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are not unique
            return self.adata.copy()


def read_user_data(
    data: Cells | UserData,
    *,
    counts: str | None = None,
    gene_column: str | None = None,
    floor: float | None = None,
    layer: str | None = None,
    access: Access | None = None,
) -> UserData:
    """Read cells of any format that ``bgen data check`` reads, find their counts and name their genes.

    Raises
    ------
    UserError
        If there is no such file, matrix, layer or column, if it is empty, or if the matrix does not hold counts.
    """
    if isinstance(data, UserData):
        return data
    require_number("floor", floor, 0, 1)
    adata, notes = (data, ()) if isinstance(data, AnnData) else _read(data, access)
    require_cells(adata)
    source = open_source(adata)
    found = find_counts(source, counts=counts, gene_column=gene_column, layer=layer)
    least = FLOOR if floor is None else floor
    return UserData(source.read(), found.matrix, found.rounding, found.genes, gene_column, least, notes)


@dataclass(frozen=True)
class FoundCounts:
    """The matrix of a source that holds the counts, how its values become integers, and which gene each column is."""

    matrix: str
    rounding: Rounding
    genes: Genes


def find_counts(
    source: Source, *, counts: str | None = None, gene_column: str | None = None, layer: str | None = None
) -> FoundCounts:
    """Find the counts of some cells, reading every value once, a block of rows at a time.

    Raises
    ------
    UserError
        If there is no such matrix, layer or column, or the matrix does not hold counts.
    """
    if counts is not None and layer is not None:
        raise UserError(f"--layer {layer} and --counts {counts} both name the matrix of counts: give one of them.")
    if layer is not None and f"layers/{layer}" not in source.matrices:
        layers = [name.removeprefix("layers/") for name in source.matrices if name.startswith("layers/")]
        raise UserError(f"The data has no layer '{layer}'.{nearest(layer, layers)}")
    looked = look(
        source,
        counts if layer is None else f"layers/{layer}",
        gene_column=gene_column,
        merge_duplicates="sum",
        accept_unnamed=True,
    )
    if gene_column is not None and gene_column not in source.var(looked.matrix):
        raise UserError(f"var has no column '{gene_column}'.{nearest(gene_column, source.var(looked.matrix).columns)}")
    found, name = looked.statistics, looked.matrix
    if counts is None and layer is None and name != "X":
        raise UserError(f"the data has no X. {advice(counts_elsewhere(source, looked))}".strip())
    if not found.usable:
        where = f"layers['{name.removeprefix('layers/')}']" if name.startswith("layers/") else name
        what = "NaN or infinite" if found.not_finite else "negative or fractional"
        said = (
            f"{where} is not counts: it holds {what} values. Give the layer with the raw counts; `bgen data check`"
            f" says where they are. {advice(counts_elsewhere(source, looked))}"
        )
        raise UserError(said.strip())
    if found.maximum >= 2**32:
        raise UserError(f"{name} has a value of {found.maximum:.6g}: no count is that large.")
    return FoundCounts(name, "nearest" if found.verdict == "near counts" else "none", looked.genes)


def read_input(path: str | os.PathLike[str]) -> AnnData:
    """Read all that a file or folder of cells, or a store, holds, whatever its format.

    Raises
    ------
    UserError
        If it is not there, cannot be read, or is empty.
    """
    return _read(path)[0]


def _read(where: str | os.PathLike[str], access: Access | None = None) -> tuple[AnnData, tuple[str, ...]]:
    if is_store(where, access):
        store = open_store(where, access=access)
        return read_anndata(store, np.arange(len(store))), ()
    path = on_this_machine(where, access)
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    source = open_source(path)
    _require_room(source)
    return source.read(), source.notes


def _require_room(source: Source) -> None:
    """Raise UserError if the matrices of a file take more memory than is free."""
    matrices = source.matrices.values()
    values = (
        about.shape[0] * about.shape[1] * about.dtype.itemsize
        if about.stored < 0
        else about.stored * (about.dtype.itemsize + 4)
        for about in matrices
    )
    needed, free = sum(values), free_memory()
    if needed > free:
        raise UserError(
            f"{source.path} takes {needed / 1e9:,.1f} GB in memory, and {free / 1e9:,.1f} GB are free. `bgen embed`,"
            " `annotate` and `denoise` read it a block at a time with --out NAME.zarr; `bgen data build` makes a store"
            " of it."
        )


def require_cells(adata: AnnData, what: str = "the data") -> None:
    """Raise UserError if there are no cells or no genes."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise UserError(f"{what} is empty: {adata.n_obs} cells x {adata.n_vars} genes. Check what was selected.")
