"""One message for a mistake that every rank found, and an end to the launcher that would only make it again."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from bgen.errors import UserError
from bgen.passwords import without_passwords

# The launcher ends the other ranks as soon as one has ended, so the others leave rank 0 this many seconds to speak.
PATIENCE = 3.0
# Seconds that ranks of one host wait for each other's mistakes where they can tell each other of them.
TOGETHER = 30.0
_MARK = "mistake"
_MISTAKE = 2


def report_user_error(error: UserError) -> int:
    """Print ``error: ...`` once for all ranks and return the exit code (2, or the error's own).

    This works before the ranks have met. Rank 0 prints, waits until the other ranks of its host have found the mistake
    too, and returns. Any other rank waits to be ended by the launcher; if it is not, the mistake is its own (a missing
    file on its host), and it prints.

    What a restart does not mend (code 2) also ends torchrun, which would restart all ranks otherwise.
    """
    text = without_passwords(str(error))
    rank = _number("RANK", 0)
    if rank > 0:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(error.exit_code))
    places = _places()
    if places:
        with contextlib.suppress(OSError):
            places[_number("LOCAL_RANK", 0)].touch()
    if rank == 0:
        _say(f"error: {text}")
        _wait_for(places)
    else:
        if places and _number("GROUP_RANK", 0) == 0 and _wait_for(places[:1]):
            time.sleep(TOGETHER)  # rank 0 has found it too, and spoken: the launcher ends this rank after it
            return error.exit_code
        time.sleep(PATIENCE)
        _say(f"error (rank {rank}): {text}")
    if error.exit_code == _MISTAKE:
        _end_torchrun()
    return error.exit_code


def _places() -> list[Path]:
    """Return where each rank of this host says that it found a mistake: beside torchrun's file for its errors."""
    given = os.environ.get("TORCHELASTIC_ERROR_FILE")
    size, local = _number("LOCAL_WORLD_SIZE", 0), _number("LOCAL_RANK", -1)
    if not given or not 0 <= local < size:
        return []
    own = Path(given).parent
    if own.name != str(local) or not own.is_dir():
        return []
    return [own.parent / str(other) / _MARK for other in range(size)]


def _wait_for(places: list[Path]) -> bool:
    deadline = time.monotonic() + TOGETHER
    while not all(place.exists() for place in places):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _end_torchrun() -> None:
    """Tell the torchrun that started this process to end, if it would start it again."""
    left = _number("TORCHELASTIC_MAX_RESTARTS", 0) - _number("TORCHELASTIC_RESTART_COUNT", 0)
    if "TORCHELASTIC_RUN_ID" not in os.environ or left <= 0:
        return
    with contextlib.suppress(psutil.Error, OSError):
        parent = psutil.Process(os.getppid())
        if any(
            "torchrun" in word or "torch.distributed" in word or "torch/distributed" in word
            for word in parent.cmdline()
        ):
            parent.terminate()


def _number(name: str, default: int) -> int:
    """Return an environment variable as a number; the default if it is none, which its own message says."""
    try:
        return int(os.environ.get(name, ""))
    except ValueError:
        return default


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)
