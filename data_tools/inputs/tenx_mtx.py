"""A 10x folder of text files: matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), each plain or .gz.

Also as such files are found in public archives: with the name of the sample before each, with a line of headers, or
with a transposed matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from bgen.errors import UserError
from data_tools.inputs.source import Matrix, Source

MATRIX = ("matrix.mtx", "matrix.mtx.gz")

HEADERS = {
    *("barcode", "barcodes", "cell", "cells", "cellid", "cellbarcode", "cellbarcodes", "cellname"),
    *("gene", "genes", "geneid", "geneids", "genename", "genenames", "genesymbol", "symbol", "feature", "features"),
    *("featureid", "featurename", "ensemblid", "id", "name", "index", "x", "v1"),
}
"""Headers of a column of barcodes or genes, in lower case and without punctuation."""


@dataclass
class TenxMtxSource(Source):
    """A 10x folder; text has to be read whole, once per pass. ``file`` is genes x cells, unless ``by_cell``."""

    file: Path = Path("matrix.mtx")
    by_cell: bool = False

    def rows_per_pass(self, name: str) -> int | None:
        """See :class:`Source`."""
        return self.n_cells

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        stored = scipy.io.mmread(self.file, spmatrix=False)
        whole = sp.csr_matrix(stored) if self.by_cell else sp.csc_matrix(stored).T
        for first in range(start, stop, step):
            yield first, sp.csr_matrix(whole[first : min(first + step, stop)])


def is_mtx(path: Path) -> bool:
    """Whether this is a folder that holds a matrix.mtx, or a matrix.mtx itself (one sample of several in a folder)."""
    return path.name.endswith(MATRIX) if path.is_file() else path.is_dir() and bool(_matrices(path))


def _matrices(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.endswith(MATRIX) and file.is_file())


def open_mtx(path: Path) -> Source:
    """Open a folder with a matrix.mtx, its barcodes.tsv and its features.tsv.

    Raises
    ------
    UserError
        If a file is missing, there are several samples, or the tables do not fit the matrix.
    """
    file = path if path.is_file() else _only(path, _matrices(path))
    prefix = file.name.removesuffix(".gz").removesuffix("matrix.mtx")
    try:
        rows, columns, stored, _, values, _ = scipy.io.mminfo(file)
        features = _table(_beside(file, prefix, "features.tsv", "genes.tsv"))
        barcodes = _table(_beside(file, prefix, "barcodes.tsv"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a 10x folder ({error}).") from error
    notes = [f"The files of the sample are those that begin with '{prefix}'."] if prefix else []
    # A matrix of as many genes as cells is taken to be genes x cells.
    shapes = [(f, b) for f in range(1 + _has_header(features)) for b in range(1 + _has_header(barcodes))]
    sizes = {(len(features) - f, len(barcodes) - b): (f, b) for f, b in shapes}
    by_cell = (rows, columns) not in sizes and (columns, rows) in sizes
    headers = sizes.get((columns, rows) if by_cell else (rows, columns))
    if headers is None:
        raise UserError(
            f"{path}: the matrix is {rows} x {columns}, but there are annotations for {len(barcodes)} cells and"
            f" {len(features)} genes. Are the three files of one sample?"
        )
    for header, table, name in zip(headers, (features, barcodes), ("features", "barcodes"), strict=True):
        if header:
            notes.append(f"The first line of the {name} is a header ({', '.join(table.iloc[0])}) and is left out.")
    if by_cell:
        notes.append("The matrix is cells x genes, not genes x cells as 10x writes it; it is read so.")
    features, barcodes = features.iloc[headers[0] :], barcodes.iloc[headers[1] :]
    names = ["symbol", "feature_type"][: features.shape[1] - 1]
    var = features.iloc[:, 1 : 1 + len(names)].set_axis(names, axis=1).set_index(pd.Index(features[0].tolist()))
    obs = pd.DataFrame(index=pd.Index(barcodes[0].tolist()))
    dtype = np.dtype(np.int64 if values == "integer" else np.float64)
    about = Matrix((len(barcodes), len(features)), dtype, "csc", int(stored))
    return TenxMtxSource(path, "10x mtx", obs, {"X": var}, {"X": about}, notes=tuple(notes), file=file, by_cell=by_cell)


def _has_header(table: pd.DataFrame) -> bool:
    """Whether the first line of a table looks like names of columns."""
    first = {"".join(letter for letter in str(text).lower() if letter.isalnum()) for text in table.iloc[0]}
    return bool(first & HEADERS)


def _only(folder: Path, files: list[Path]) -> Path:
    plain = [file for file in files if file.name in MATRIX]
    if len(files) > 1 and not plain:
        raise UserError(
            f"{folder}: holds several samples ({', '.join(file.name for file in files[:4])}"
            f"{', ...' if len(files) > 4 else ''}). Give the matrix of one sample, such as {files[0]}."
        )
    return (plain or files)[0]


def _beside(file: Path, prefix: str, *names: str) -> Path:
    """Return the file of the matrix's sample that has one of these names, plain or .gz."""
    for name in names:
        for hit in (file.with_name(f"{prefix}{name}"), file.with_name(f"{prefix}{name}.gz")):
            if hit.exists():
                return hit
    there = ", ".join(sorted(p.name for p in file.parent.iterdir())[:8])
    wanted = " or ".join(prefix + name for name in names)
    raise UserError(f"{file.parent}: a 10x folder needs {wanted} (plain or .gz). The folder holds: {there}.")


def _table(file: Path) -> pd.DataFrame:
    """Return a table of texts without names of columns."""
    return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False)
