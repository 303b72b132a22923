"""Which cells are for training, the held-out loss and testing."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.errors import UserError
from bgen.store.splits import assign, assign_groups, require_cells
from data_tools.building.splits import describe_shares, parse_splits

FEW = {"train": 0.98, "valid": 0.01, "test": 0.01}


@pytest.mark.parametrize("donors", [3, 5, 12, 50])
@pytest.mark.parametrize("seed", range(5))
def test_no_split_of_whole_groups_is_empty(donors: int, seed: int) -> None:
    groups = np.repeat([f"D{i:02d}" for i in range(donors)], 40)
    codes = assign(FEW, groups, len(groups), seed)
    assert np.bincount(codes, minlength=3).min() >= 40
    assert np.bincount(codes)[0] == max(np.bincount(codes))
    assert all(len(set(codes[groups == donor])) == 1 for donor in set(groups))
    assert np.array_equal(assign_groups(FEW, groups, seed, held_out={}), codes)
    require_cells(FEW, codes)


def test_splits_that_had_cells_are_as_they_were() -> None:
    """Which group goes where must not change: stores are built again and compared."""
    groups = np.repeat([f"D{i:02d}" for i in range(20)], np.arange(20, 40))
    codes = assign({"train": 0.8, "valid": 0.1, "test": 0.1}, groups, len(groups), 3)
    drawn = [int(codes[groups == f"D{i:02d}"][0]) for i in range(20)]
    assert drawn == [
        2,
        1,
        0,
        1,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        2,
        0,
        0,
        0,
        0,
    ]


def test_a_split_without_cells_is_an_error() -> None:
    codes = assign(FEW, None, 20, 0)
    with pytest.raises(UserError, match=r"'valid' would hold no cell: it is to have 0\.01 of 20 cells"):
        require_cells(FEW, codes)
    require_cells({"train": 1.0, "valid": 0.0}, assign({"train": 1.0, "valid": 0.0}, None, 20, 0))


def test_shares_that_are_far_from_what_was_asked_for_are_said() -> None:
    assert describe_shares(FEW, {"train": 60, "valid": 20, "test": 20}, "donor") == [
        "The split 'train' has 60.0% of the cells, not 98.0%: values of donor are kept whole.",
        "The split 'valid' has 20.0% of the cells, not 1.0%: values of donor are kept whole.",
        "The split 'test' has 20.0% of the cells, not 1.0%: values of donor are kept whole.",
    ]
    assert describe_shares(parse_splits("train=0.8,valid=0.2"), {"train": 79, "valid": 21}, "donor") == []
