"""The one exception that means "the user can mend this", and the nearest-name hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_CELLS = 10_000_000
"""Cells that are generated or predicted at once, at most: they are held in memory."""

MOST_COUNTS = 1e9
"""Total counts of a cell, at most."""

MOST_SEEDS = 2**63 - 1
"""The largest seed."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The command line prints the message alone, without a traceback, and exits with ``exit_code``. So the message says
    what is wrong, where, and what to do.
    """

    exit_code = 2


class Unreachable(UserError, OSError):
    """What cannot be read now, and may be later: a disk, a file system or a server that does not answer.

    Training waits for it (``train.data_patience``), and a build keeps what it has done.
    """


_NO_MEMORY = (
    "DefaultCPUAllocator: ",
    "not enough memory: you tried to allocate",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
"""What torch says when there is no memory left: on Linux and macOS, on Windows, and on accelerators."""


def memory_ran_out(error: BaseException) -> bool:
    """Return whether an error says that no memory was left: Python's, numpy's, and all that torch has for it."""
    if isinstance(error, MemoryError):
        return True
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    return isinstance(error, RuntimeError) and (named or any(text in str(error) for text in _NO_MEMORY))


def require_number(name: str, value: float | None, low: float, high: float, *, whole: bool = False) -> None:
    """Raise UserError if a number that was given is not from ``low`` to ``high``; NaN and infinite ones never are.

    ``whole``: it has to be a whole number.
    """
    if value is None:
        return
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise UserError(f"{name} is a number, not {value!r}.")
    if not low <= value <= high:  # NaN is neither
        raise UserError(f"{name} is a number from {low:g} to {high:g}, not {float(value):g}.")
    if whole and value != int(value):
        raise UserError(f"{name} is a whole number, not {float(value):g}.")


def nearest(name: str, choices: Iterable[object]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``choices``, or their list, or an empty string."""
    names = list(dict.fromkeys(map(str, choices)))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:
        folded = {choice.lower(): choice for choice in names}
        close = [folded[hit] for hit in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)]
    if close:
        return f" Did you mean '{close[0]}'?"
    if 0 < len(names) <= 20:
        return f" There are: {', '.join(names)}."
    return ""
