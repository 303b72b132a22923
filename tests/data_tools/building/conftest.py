"""Two files to build from, with other genes and orders of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made import random_counts, write_h5ad


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return [
        write_h5ad(folder / "one.h5ad", random_counts(900, 1)),
        write_h5ad(folder / "two.h5ad", random_counts(501, 2).tocsc(), first_gene=100),
    ]
