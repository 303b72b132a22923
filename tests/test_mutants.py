"""Every mutant is killed by the tests that are there for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import read_mutants, survivors

ROOT = Path(__file__).resolve().parents[1]


def test_what_mutants_change_is_there() -> None:
    for mutant in read_mutants():
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant.name
        assert all((ROOT / test).exists() for test in mutant.tests), mutant.name


@pytest.mark.slow
def test_no_mutant_survives() -> None:
    assert survivors() == []
