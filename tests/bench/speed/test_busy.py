"""Processes that keep cores busy: as many as asked for, and none is left behind."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bgen.bench.speed.busy import keeping_busy


def test_they_run_meanwhile_and_are_ended() -> None:
    with keeping_busy(2) as pids:
        assert len(set(pids)) == 2
        for pid in pids:
            assert psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
            assert psutil.Process(pid).parent() == psutil.Process()
    assert not any(map(psutil.pid_exists, pids))
    with keeping_busy(0) as pids:
        assert pids == []


def test_they_are_ended_after_an_error() -> None:
    pids: list[int] = []
    with pytest.raises(KeyError), keeping_busy(1) as started:  # noqa: PT012 - the error is within
        pids += started
        raise KeyError
    assert len(pids) == 1
    assert not psutil.pid_exists(pids[0])


def test_they_end_when_who_started_them_is_killed() -> None:
    code = """
import os, signal
from bgen.bench.speed.busy import keeping_busy
with keeping_busy(1) as pids:
    print(pids[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    here = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == -9, done.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(timeout=60)
    assert not psutil.pid_exists(int(done.stdout))
