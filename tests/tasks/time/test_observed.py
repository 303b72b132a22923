"""What a population between observed ones is asked with."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.tasks.time.observed import Task

ROWS = np.arange(3)


def test_the_share_of_the_way_is_what_lies_behind() -> None:
    task = Task(0, 4.0, {0.0: ROWS, 2.0: ROWS, 10.0: ROWS, 20.0: ROWS}, 5)
    assert task.side(False) == [0.0, 2.0]
    assert task.side(True) == [10.0, 20.0]
    assert task.share == pytest.approx(0.25)
