"""Columns of obs as a store keeps them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bgen.store.format.columns import MAX_CATEGORIES, encode_column


@pytest.mark.parametrize("distinct", [["T", "B", "NK", "é"], [3, 20, 100], [True, False], [0.5, 2.0], ["1", 1]])
def test_categories_are_those_of_their_texts(distinct: list[object]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, len(distinct), 200)
    column = pd.Series(pd.Categorical.from_codes(codes, [*distinct, "nobody has it"]))
    found = encode_column(column)
    texts = [None if code < 0 else str(distinct[code]) for code in codes]
    expected = encode_column(pd.Series(texts, dtype=object))
    assert found is not None
    assert expected is not None
    assert found[0] == expected[0]
    assert np.array_equal(found[1], expected[1])
    assert found[1].dtype == np.int32
    assert -1 in found[1]


def test_categories_without_a_cell_do_not_count() -> None:
    column = pd.Series(pd.Categorical.from_codes([5, 5], [f"c{i}" for i in range(MAX_CATEGORIES + 1)]))
    found = encode_column(column)
    assert found is not None
    assert found[0].categories == ["c5"]
