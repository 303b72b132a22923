"""Processes that do the work of a build."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_tools.building.partial import Interrupted, all_or_nothing
from data_tools.building.run_tasks import open_runner


def test_workers_that_die_leave_a_build_that_goes_on(tmp_path: Path) -> None:
    with (
        pytest.raises(Interrupted, match=r"died again and again.*the same command goes on"),
        all_or_nothing(tmp_path / "store", {"the seed": "0"}) as partial,
        open_runner(1, None, partial) as runner,
    ):
        runner.run(os._exit, [(1,)], [1], lambda done, all: None)
    assert [path.name for path in tmp_path.iterdir()] == [".store.partial"]
