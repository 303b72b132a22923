"""Read what HDF5 files say of themselves, in a process of its own: the library can hang, or crash, on a damaged file.

``python -m data_tools.inputs.hdf5_probe`` reads a path a line from its standard input and answers with a line: "." for
each object that was read, "ok" or what is wrong. :func:`require_readable` asks it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import h5py
import numpy as np
import psutil

from bgen.errors import UserError

PATIENCE = 40.0
"""Seconds without an answer after which the library is taken to hang."""

PIECE = 100_000
"""Texts that are read at once."""

ROOM = 1 << 30
"""Bytes that the process may take beside what it has: a few bytes of a damaged file promise any number of them."""

MOST_TEXTS = 1000
"""Texts for each byte that is stored; one with more is refused later, for the memory that it would take."""


class Probe:
    """The process that reads, and what it has answered so far. It belongs to the process that started it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data_tools.inputs.hdf5_probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[2],
        )
        self.told = b""
        atexit.register(self.end)

    def end(self) -> None:
        """End it."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()

    def ask(self, path: Path) -> str:
        """Return "ok", or what is wrong with a file."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then it has ended, which is seen below
            self.process.stdin.write(json.dumps(str(path.resolve())).encode() + b"\n")
            self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                *lines, self.told = self.told.split(b"\n")
                if answers := [line for line in lines if line != b"."]:
                    return answers[0].decode(errors="replace")
                if not selector.select(PATIENCE):
                    return f"the HDF5 library has not come back for {PATIENCE:.0f} s"
                if not (more := os.read(self.process.stdout.fileno(), 1 << 16)):
                    return "the HDF5 library crashed"
                self.told += more


_one_at_a_time = threading.Lock()
_probes: list[Probe] = []


def require_readable(path: Path) -> None:
    """Raise UserError if what a file says of itself, or its texts, cannot be read: objects, attributes, names.

    The values of matrices are not looked at.
    """
    with _one_at_a_time:
        if not _probes or _probes[0].owner != os.getpid():
            _probes[:] = [Probe()]
        answer = _probes[0].ask(path)
        if answer != "ok":
            _probes.pop().end()
            raise UserError(f"{path}: cannot be read ({answer}). Is the file damaged or cut off?")


def probe(path: str, out: IO[str]) -> None:
    """Read all that :func:`require_readable` names.

    Raises
    ------
    ValueError
        If the texts are longer together than the file: no writer lets them share bytes, and read they would not.
    """
    room = Path(path).stat().st_size
    with h5py.File(path, "r") as file:
        names: list[str] = ["/"]
        file.visit(names.append)
        for name in names:
            item = file[name]
            for key in list(item.attrs):
                item.attrs[key]
            texts = isinstance(item, h5py.Dataset) and item.shape is not None and item.dtype.kind == "O"
            if texts and item.size <= MOST_TEXTS * item.id.get_storage_size():
                for start in range(0, len(item) if item.shape else 1, PIECE):
                    piece = np.ravel(item[start : start + PIECE] if item.shape else item[()])
                    room -= sum(map(len, piece))
                    if room < 0:
                        raise ValueError(f"the texts of '{name}' share bytes, and would take far more than the file")
                    print(".", file=out, flush=True)
            print(".", file=out, flush=True)


def main() -> None:
    """Answer each line of standard input."""
    held, (_, most) = psutil.Process().memory_info().vms, resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":  # elsewhere the size of the address space says nothing
        resource.setrlimit(resource.RLIMIT_AS, (held + ROOM if most < 0 else min(held + ROOM, most), most))
    for line in sys.stdin:
        try:
            probe(json.loads(line), sys.stdout)
            print("ok", flush=True)
        except Exception as error:
            print(" ".join(str(error).split()) or type(error).__name__, flush=True)


if __name__ == "__main__":
    main()
