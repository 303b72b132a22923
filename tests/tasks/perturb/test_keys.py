"""What was done to each cell, looked up once per label and dose."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from bgen.tasks.perturb.keys import named, screen_keys
from bgen.tasks.perturb.screen import Columns
from data_tools.check.labels import Grammar


def test_every_cell_has_the_key_of_its_label_and_dose(monkeypatch: pytest.MonkeyPatch) -> None:
    label = ["A+B", "ctrl", "B+A", "A", None, "A", "A", "A+ctrl", "ctrl"]
    dose = [1.0, 5.0, 1.0, np.nan, 1.0, 0.0, 2.0, 2.0, np.nan]
    asked: list[str] = []
    members = Grammar.members

    def counted(self: Grammar, text: str) -> tuple[str, ...]:
        asked.append(text)
        return members(self, text)

    monkeypatch.setattr(Grammar, "members", counted)
    obs = pd.DataFrame({"p": label * 50, "dose": dose * 50}, index=[str(row) for row in range(450)])
    cells = anndata.AnnData(np.zeros((450, 1), np.float32), obs=obs)
    keys = screen_keys(cells, Columns("p", "ctrl", "dose", separator="+"))
    control = (("ctrl",), None)
    pair, alone = (("A", "B"), 1.0), (("A",), None)
    assert [keys.distinct[number] for number in keys.number[:9]] == [
        pair, control, pair, alone, ((), None), (("A",), 0.0), (("A",), 2.0), (("A",), 2.0), control,
    ]  # fmt: skip
    assert len(asked) < 20  # a few times for each label, not for each of 450 cells
    assert keys.rows(pair)[:4].tolist() == [0, 2, 9, 11]
    assert keys.rows((("new",), None)).tolist() == []
    assert list(keys.perturbed()) == [pair, alone, (("A",), 0.0), (("A",), 2.0)]
    assert keys.perturbed()[(("A",), 2.0)][:2].tolist() == [6, 7]
    assert keys.where(lambda key: key[1] == 0)[:9].tolist() == [False] * 5 + [True] + [False] * 3
    assert [named(key) for key in (pair, alone)] == ["A+B@1", "A"]
