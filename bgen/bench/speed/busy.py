"""Programs that keep cores busy beside a measurement, as on a machine that others use too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

LOOP = """
import os
started_by = os.getppid()
print("running", flush=True)
while os.getppid() == started_by:  # so that none is left when the measurement is killed
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def keeping_busy(number: int) -> Iterator[list[int]]:
    """Let ``number`` processes each keep a core busy meanwhile; gives their process ids once all of them run."""
    with ExitStack() as stack:
        started = []
        for _ in range(number):
            process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE)
            stack.callback(_end, process)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"a process that was to keep a core busy ended with {process.wait()}")
        yield [process.pid for process in started]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
