"""Processes of Python that begin with the heavy packages loaded: what tests start many of, as a rank or a command line.

torch, DeepSpeed and bgen take some six seconds to import, and most tests that start a process say nothing about that.
``python()`` is a command that takes the arguments of Python and behaves like it, but the process that does the work is
forked from one that has imported everything (:mod:`prefork_server`). Arguments, environment, folder, files and signals
are the caller's, and so is the way it ends. torchrun starts its ranks so, too, where ``PYTHON_EXEC`` names the command;
where ``PREFORK_EXECUTABLE`` names it, it is the ``sys.executable`` of the processes that it starts.

What a process does before it imports torch, and how many threads it takes, cannot be tested so: ``sys.executable`` can.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""Folders of commands. From Python 3.13 on, forks of multiprocessing forget what atexit holds: it would end them."""

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@functools.cache
def python() -> str:
    """Return the path of the command; the first call starts the process that it forks from."""
    if sys.platform != "linux":  # fork does not go together with what other systems load
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="prefork-", dir="/tmp")  # the path of a socket has to be short
    KEPT.append(folder)
    atexit.register(folder.cleanup)
    socket = Path(folder.name, "socket")
    command = Path(folder.name, "python")
    client = HERE / "prefork_client.py"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "{socket}" "$@"\n', encoding="utf-8")
    command.chmod(0o700)
    found = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([found] if found else [])]),
    }
    server = subprocess.Popen(
        [sys.executable, str(HERE / "prefork_server.py"), str(socket)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(server.communicate)  # closes its input: it ends with this process, however this one ends
    assert b"ready\n" in iter(server.stdout.readline, b"")  # what packages say as they load comes before
    return str(command)


def torchrun(ranks: int, *options: str) -> list[str]:
    """Return the command that starts so many ranks by torchrun, all of them with everything imported."""
    launcher = [python(), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    return ["/usr/bin/env", f"PYTHON_EXEC={python()}", *launcher]
