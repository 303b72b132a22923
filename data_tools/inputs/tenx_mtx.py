"""A 10x folder of text files: matrix.mtx, barcodes.tsv and features.tsv."""

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


@dataclass
class TenxMtxSource(Source):
    """A 10x folder; text has to be read whole, once per pass."""

    file: Path = Path("matrix.mtx")

    def rows_per_pass(self, name: str) -> int | None:
        """See :class:`Source`."""
        return self.n_cells

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        whole = sp.csc_matrix(scipy.io.mmread(self.file, spmatrix=False)).T
        for first in range(start, stop, step):
            yield first, sp.csr_matrix(whole[first : min(first + step, stop)])


def open_mtx(path: Path) -> Source:
    """Open a folder with matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), each plain or .gz."""

    def find(*names: str) -> Path:
        for name in names:
            for hit in (path / name, path / f"{name}.gz"):
                if hit.exists():
                    return hit
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path}: a 10x folder needs {' or '.join(names)} (plain or .gz). The folder holds: {there}.")

    file = find("matrix.mtx")
    features_file, barcodes_file = find("features.tsv", "genes.tsv"), find("barcodes.tsv")
    try:
        features = pd.read_csv(features_file, sep="\t", header=None, dtype=str, keep_default_na=False)
        barcodes = pd.read_csv(barcodes_file, sep="\t", header=None, dtype=str, keep_default_na=False)
        n_genes, n_cells, stored, _, values, _ = scipy.io.mminfo(file)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a 10x folder ({error}).") from error
    columns = ["symbol", "feature_type"][: features.shape[1] - 1]
    var = features.iloc[:, 1 : 1 + len(columns)].set_axis(columns, axis=1).set_index(pd.Index(features[0], name=None))
    obs = pd.DataFrame(index=pd.Index(barcodes[0], name=None))
    about = Matrix((n_cells, n_genes), np.dtype(np.int64 if values == "integer" else np.float64), "csc", int(stored))
    return TenxMtxSource(path, "10x mtx", obs, {"X": var}, {"X": about}, {}, file)
