"""Times and doses as text: read with their unit, or named; never dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_tools.check.quantities import read_quantities


@pytest.mark.parametrize(
    ("what", "texts", "unit", "numbers"),
    [
        ("time", ["day 3", "Day_0", "d7", "day-14"], "days", [3, 0, 7, 14]),
        ("time", ["24h", "2d", "0"], "hours", [24, 48, 0]),
        ("time", ["E8.5", "E10"], "days", [8.5, 10]),
        ("time", ["48 hrs", "6 hpf"], "hours", [48, 6]),
        ("time", ["T24", "T0"], None, [24, 0]),
        ("time", pd.Categorical(["0", "24"]), None, [0, 24]),
        ("dose", ["0", "10 uM", "1 \u00b5M", "100nM"], "nM", [0, 10000, 1000, 100]),
        ("dose", ["5 ng/ml", "1 ug/ml"], "ng/ml", [5, 1000]),
        ("dose", ["1e-6 M", "2 uM"], "uM", [1, 2]),
        ("dose", [0, "10 uM", None], "uM", [0, 10, np.nan]),
    ],
)
def test_texts_are_read(what: Any, texts: Any, unit: str | None, numbers: list[float]) -> None:
    found = read_quantities(pd.Series(texts), what)
    assert found.wrong == {}
    assert found.unit == unit
    np.testing.assert_allclose(found.numbers, numbers)


@pytest.mark.parametrize(
    ("what", "texts", "wrong"),
    [
        ("dose", ["0", "5", "10 uM"], ["5"]),  # 5 of what?
        ("dose", ["vehicle", "10 uM"], ["vehicle"]),
        ("dose", ["1,5", "2"], ["1,5"]),
        ("dose", ["10 uM", "3 ug/ml", "2 uM"], ["3 ug/ml"]),
        ("time", ["7*24", "0"], ["7*24"]),
        ("time", ["E8.5", "P1", "P2"], ["E8.5"]),  # before and after birth are not one scale
        ("time", ["2-cell", "4-cell"], ["2-cell", "4-cell"]),
        ("time", ["inf", "2"], ["inf"]),
    ],
)
def test_what_cannot_be_read_is_named(what: Any, texts: list[str], wrong: list[str]) -> None:
    found = read_quantities(pd.Series(texts), what)
    assert sorted(found.wrong) == sorted(wrong)
    assert f"'{wrong[0]}' (1 cells)" in found.complaint()


def test_a_unit_that_is_asked_for() -> None:
    assert read_quantities(pd.Series(["day 3", "12"]), "time", "hours").numbers.tolist() == [72, 12]
    assert list(read_quantities(pd.Series(["5 ng/ml"]), "dose", "uM").wrong) == ["5 ng/ml"]
    assert read_quantities(pd.Series(["P7", "E9", "E10"]), "time", "days").wrong == {"P7": 1}
