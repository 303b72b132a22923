"""Columns of a user's obs: names as text, times and doses in the model's units, and what is not known of them."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from bgen.errors import UserError
from bgen.hub.directory import ColumnInfo
from bgen.tasks.columns import as_text, match_columns, text_column


def test_whole_numbers_are_names_without_a_point() -> None:
    assert as_text(pd.Series([3.0, np.nan, 12.0])).tolist() == ["3", "", "12"]
    assert as_text(pd.Series([3, 12])).tolist() == ["3", "12"]
    assert as_text(pd.Series([3.5, 12.0])).tolist() == ["3.5", "12.0"]
    assert as_text(pd.Series(["B", None], dtype=object)).tolist() == ["B", ""]


def test_columns_meet_the_models_categories_and_units() -> None:
    obs = pd.DataFrame(
        {"type": [1.0, 2.0, 7.0, np.nan], "stage": ["day 1", "48h", "late", None], "score": list("12x4")}
    )
    columns = {
        "cell_type": ColumnInfo("type", "category", ["1", "2"]),
        "time": ColumnInfo("stage", "number"),
        "score": ColumnInfo("score", "number"),
        "batch": ColumnInfo("batch", "category", ["a"]),
    }
    found, where, unknown, said = match_columns(obs, columns, {"stage": "hours"})
    assert where == {"cell_type": "type", "time": "stage", "score": "score"}
    assert found["cell_type"].tolist() == [0, 1, -1, -1]
    np.testing.assert_array_equal(found["score"], [1, 2, np.nan, 4])
    assert unknown["cell_type"] == {"7": 1}
    assert unknown["score"] == {"x": 1}
    timed = {"time": ColumnInfo("time", "number")}
    found, _, unknown, said = match_columns(obs.rename(columns={"stage": "time"}), timed, {"time": "hours"})
    np.testing.assert_array_equal(found["time"], [24, 48, np.nan, np.nan])
    assert unknown == {"time": {"late": 1}}
    assert said == ["The texts of obs['time'] are read as hours: 'day 1' is 24, '48h' is 48."]


def test_controls_may_be_called_like_nothing() -> None:
    obs = pd.DataFrame({"drug": ["None", "NA", "x", None]}, index=list("abcd"))
    cells = anndata.AnnData(np.ones((4, 1), np.float32), obs=obs)
    assert text_column(cells, "drug").tolist() == ["", "", "x", ""]
    assert text_column(cells, "drug", keep=["None"]).tolist() == ["None", "", "x", ""]
    with pytest.raises(UserError, match="no column 'drg'"):
        text_column(cells, "drg")
