"""The one exception that means "the user can mend this", and the nearest-name hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def nearest(name: str, choices: Iterable[object]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``choices``, or their list, or an empty string."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:
        folded = {choice.lower(): choice for choice in names}
        close = [folded[hit] for hit in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)]
    if close:
        return f" Did you mean '{close[0]}'?"
    if 0 < len(names) <= 20:
        return f" There are: {', '.join(names)}."
    return ""
