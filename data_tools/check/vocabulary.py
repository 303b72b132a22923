"""Which genes a store has: all genes of its inputs, or those of a reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.errors import UserError
from bgen.genes.table import NAME, match_names


def read_reference(path: Path) -> pd.DataFrame:
    """Read a reference vocabulary: columns id, symbol.

    Parameters
    ----------
    path
        A table (.csv, .tsv, .txt) with gene ids in a column "id" or else the first one, and with symbols, if any, in a
        column "symbol" or else the second one; or the folder of a store or model, whose genes are taken.

    Raises
    ------
    UserError
        If it cannot be read, is empty, or names a gene twice.
    """
    file = path / NAME if path.is_dir() else path
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The reference genes {path} cannot be read ({error}).") from None
    rows = [[cell.strip().strip('"') for cell in line.replace("\t", ",").split(",")] for line in lines]
    id_column, symbol_column = 0, 1
    if rows and "id" in rows[0]:
        id_column = rows[0].index("id")
        symbol_column = rows[0].index("symbol") if "symbol" in rows[0] else len(rows[0])
        rows = rows[1:]
    rows = [row for row in rows if row[id_column]]
    if not rows:
        raise UserError(f"The reference genes {path} are empty: give one gene id a line.")
    ids = [row[id_column] for row in rows]
    symbols = [row[symbol_column] if len(row) > symbol_column else "" for row in rows]
    table = pd.DataFrame({"id": ids, "symbol": symbols})
    if (twice := table["id"].duplicated()).any():
        raise UserError(f"The reference genes {path} name {table['id'][twice].iloc[0]} twice.")
    return table


def take_reference(genes: pd.DataFrame, reference: Path) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    """Return the genes of a store that follows a reference, and the place of each gene of the inputs among them.

    Genes are matched by id; where none is found, with symbols (:func:`bgen.genes.table.match_names`).

    Parameters
    ----------
    genes
        Columns id, symbol of the inputs' genes.

    Returns
    -------
    tuple
        Columns id, symbol in the reference's order; int64 ``[G of the inputs]``, -1 = left out.

    Raises
    ------
    UserError
        If the reference has none of the inputs' genes, or cannot be read.
    """
    table = read_reference(reference)
    ids, symbols_given = genes["id"].tolist(), genes["symbol"].tolist()
    places, _ = match_names(table.assign(cells=0), ids, symbols_given, enough=1 / len(table))
    if (places < 0).all():
        raise UserError(
            f"The reference genes {reference} have none of the inputs' genes: it names genes like"
            f" {', '.join(table['id'][:3])}, the inputs like {', '.join(genes['id'][:3])}."
        )
    found = places >= 0
    unnamed = (table["symbol"].to_numpy()[places] == "") & found
    symbols = table["symbol"].to_numpy(object).copy()
    symbols[places[unnamed]] = genes["symbol"].to_numpy(object)[unnamed]
    return table.assign(symbol=symbols), places
