"""A table of samples: what is known of whole files, a row for each, as columns of all of a file's cells.

The first column names the files, as a path, or by the last part of it with or without its ending: ``donor1.h5ad`` or
``donor1``. All others become columns of obs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bgen.errors import UserError, nearest
from data_tools.cells.mapped import room
from data_tools.inputs.source import Source


@dataclass(frozen=True)
class Samples:
    """A table of samples; its index names files."""

    path: Path
    table: pd.DataFrame

    def join(self, source: Source) -> None:
        """Add the columns of a source's row to its obs.

        Raises
        ------
        UserError
            If the file has no row, or two, or a column is in obs already.
        """
        names = {str(source.path), str(source.path.absolute()), source.path.name, source.path.stem}
        found = [name for name in self.table.index if name in names]
        if len(found) != 1:
            what = f"{len(found)} rows ({', '.join(found)})" if found else "no row"
            hint = "" if found else nearest(source.path.name, self.table.index)
            raise UserError(f"{source.path}: the table {self.path} has {what} for this file.{hint}")
        if both := [column for column in self.table if column in source.obs]:
            raise UserError(
                f"{source.path}: obs has a column '{both[0]}' already, as the table {self.path} has. Rename it there."
            )
        row = self.table.loc[found[0]]
        source.obs = source.obs.copy(deep=False)  # the others stay where they are
        for column in self.table:
            text = self.table[column].dtype == object
            value = room(source.n_cells, np.int8 if text else np.asarray(row[column]).dtype)
            value[:] = 0 if text else row[column]
            kinds = pd.CategoricalDtype([row[column]])
            source.obs[str(column)] = pd.Categorical.from_codes(value, dtype=kinds) if text else value


def read_samples(path: Path) -> Samples:
    """Read a table of samples, .csv or .tsv.

    Raises
    ------
    UserError
        If it cannot be read, holds no column but names, has gaps, or names a file twice.
    """
    if not path.is_file():
        raise UserError(f"--obs: there is no file {path}.")
    try:
        table = pd.read_csv(path, sep="\t" if path.suffix.lower() in (".tsv", ".txt") else ",")
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise UserError(f"--obs: {path} is no table: {str(error)[:200]}.") from None
    if table.shape[1] < 2 or not len(table):
        raise UserError(f"--obs: {path} needs a heading, a first column that names files, and columns for obs.")
    if table.isna().any(axis=None):
        raise UserError(f"--obs: {path} has a gap in column '{table.columns[table.isna().any()][0]}'.")
    table = table.set_index(table.columns[0])
    table.index = table.index.astype(str)
    if table.index.duplicated().any():
        raise UserError(f"--obs: {path} names '{table.index[table.index.duplicated()][0]}' twice.")
    texts = [column for column in table if not pd.api.types.is_numeric_dtype(table[column])]
    return Samples(path, table.astype(dict.fromkeys(texts, object)))
