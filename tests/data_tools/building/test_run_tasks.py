"""Processes that do the work of a build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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


@pytest.fixture
def lone_scheduler(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler and a worker of Dask, each a process of its own."""
    about = tmp_path / "scheduler.json"
    dask, here = [sys.executable, "-m"], ["--host", "127.0.0.1", "--no-dashboard"]
    scheduler = subprocess.Popen(
        [*dask, "distributed.cli.dask_scheduler", *here, "--port", "0", "--scheduler-file", str(about)],
        stderr=subprocess.DEVNULL,
    )
    while not about.exists() or not about.read_text().endswith("}"):
        assert scheduler.poll() is None
        time.sleep(0.05)
    address = json.loads(about.read_text())["address"]
    worker = subprocess.Popen(
        [*dask, "distributed.cli.dask_worker", address, *here, "--no-nanny", "--local-directory", str(tmp_path)],
        stderr=subprocess.DEVNULL,
    )
    yield address, scheduler
    for process in (worker, scheduler):
        process.kill()
        process.wait()


def test_a_scheduler_that_is_lost_leaves_a_build_that_goes_on(
    tmp_path: Path, lone_scheduler: tuple[str, subprocess.Popen[bytes]]
) -> None:
    address, scheduler = lone_scheduler

    def lose(done: int, everything: int) -> None:
        scheduler.send_signal(signal.SIGKILL)
        scheduler.wait()

    with (
        pytest.raises(Interrupted, match=r"cluster was lost.*the same command goes on"),
        all_or_nothing(tmp_path / "store", {"the seed": "0"}) as partial,
        open_runner(1, address, partial) as runner,
    ):
        runner.run(time.sleep, [(0.01,)] * 100, [1] * 100, lose)
    assert (tmp_path / ".store.partial").is_dir()
