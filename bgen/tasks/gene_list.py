"""Genes that a user names: in a file, as the genes of some cells, or as a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData

from bgen.errors import UserError
from data_tools.check.genes import ID_COLUMNS, SYMBOL_COLUMNS, resolve_genes
from data_tools.check.look import in_order
from data_tools.inputs.registry import open_source

GeneList: TypeAlias = str | os.PathLike[str] | AnnData | pd.DataFrame | Sequence[str]
"""A file (.csv, .tsv, .txt, or cells of any format), cells in memory, a table, or ids."""

TEXT = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
"""Files of text, and what stands between their columns."""

IDS = ("id", *ID_COLUMNS, "gene", "genes", "name", "")
SYMBOLS = ("symbol", *SYMBOL_COLUMNS)
"""Columns of a table that hold ids and symbols, the first that is there; otherwise the first and the second column."""


def read_gene_list(genes: GeneList, gene_column: str | None = None) -> pd.DataFrame:
    """Return the distinct genes with ``id`` and ``symbol`` (the id where there is none).

    A text file has a gene in each row: its id and, if it has a second column, its symbol; a heading may say which is
    which. Of cells it is var. Versions of Ensembl ids are cut off.

    Parameters
    ----------
    gene_column
        Column with the ids.

    Raises
    ------
    UserError
        If it cannot be read, names no gene, or lacks the column.
    """
    var, where = _var(genes)
    found = resolve_genes(var, gene_column, "sum", accept_unnamed=True, synthetic=True)
    errors = [finding.message for finding in found.findings if finding.level == "error"]
    if errors:
        raise UserError(f"{where}: {' '.join(errors)}")
    if not len(found.ids):
        raise UserError(f"{where} names no gene.")
    return pd.DataFrame({"id": found.ids.astype(str), "symbol": found.symbols.astype(str)})


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Read the first two columns of a text file, such as genes of one species and of another; a heading is a row, too.

    Raises
    ------
    UserError
        If it cannot be read, or has no second column.
    """
    table = _table(path)
    if table.shape[1] < 2:
        raise UserError(f"{path} has one column: it needs two, a new gene and the known one whose vector it gets.")
    pairs = zip(table[0].str.strip(), table[1].str.strip(), strict=True)
    return [(new, known) for new, known in pairs if new and known]


def _var(genes: GeneList) -> tuple[pd.DataFrame, str]:
    """Return an annotation of genes, its index the ids, and what to call it."""
    if isinstance(genes, pd.DataFrame):
        return _with_ids(genes), "the table of genes"
    if isinstance(genes, AnnData):
        return genes.var, "var"
    if not isinstance(genes, str | os.PathLike):
        return pd.DataFrame(index=pd.Index([str(name) for name in genes], dtype=object)), "the list of genes"
    path = Path(genes)
    if path.suffix.lower() not in TEXT:
        if not path.exists():
            raise UserError(f"There is no file {path}.")
        source = open_source(path)
        return source.var(in_order(source)[0]), str(path)
    table = _table(path)
    first = [str(name).strip() for name in table.iloc[0]]
    if first[0].lower() in (*IDS, *SYMBOLS):
        table = table.iloc[1:].set_axis(first, axis=1)
        return _with_ids(table), str(path)
    columns = ["id", "symbol", *map(str, range(2, table.shape[1]))]
    return _with_ids(table.set_axis(columns[: table.shape[1]], axis=1)), str(path)


def _with_ids(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose index are the ids, and whose symbols stand where the check looks for them."""
    by_name = {str(column).lower(): column for column in reversed(table.columns)}
    ids = next((by_name[name] for name in (*IDS, *SYMBOLS) if name in by_name), None)
    if ids is None:
        return table
    values = table[ids].astype(str).str.strip()
    var = table.assign(**{str(ids): values}).set_index(pd.Index(values.to_numpy(), dtype=object))
    symbol = next((by_name[name] for name in SYMBOLS if name in by_name and by_name[name] != ids), None)
    if symbol is not None:
        given = table[symbol].astype(str).str.strip().to_numpy()
        var["feature_name"] = np.where(given == "", values, given)
    return var[values.to_numpy() != ""]


def _table(path: Path) -> pd.DataFrame:
    """Read a text file as columns of texts."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        return pd.read_csv(
            path, sep=TEXT.get(path.suffix.lower(), ","), header=None, dtype=str, keep_default_na=False, comment=None
        )
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:  # an empty file is a ValueError, too
        raise UserError(f"{path} cannot be read as a table: {str(error)[:200]}.") from None
