"""Gene sets of a .gmt file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bgen.errors import UserError
from bgen.genes.sets import read_gene_sets


def test_a_file_becomes_rows_of_genes(tmp_path: Path) -> None:
    path = tmp_path / "sets.gmt"
    path.write_text("small\thttp://x\tSTAT1\tirf1\n\nlarge\t\tSTAT1\tJAK2\tA\tB\n")
    sets = read_gene_sets(path)
    expected = [[2**-0.5, 0.5], [2**-0.5, 0], [0, 0.5], [0, 0]]
    np.testing.assert_allclose(sets.rows(["STAT1", "IRF1", "jak2", "none"]), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no gene set"), ("a\tb\tX\nname only\n", "line 2: a gene set is"), (None, "cannot be read")],
)
def test_what_is_no_gene_set_is_told(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "sets.gmt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_gene_sets(path)
