"""One message for a mistake that every rank found."""

from __future__ import annotations

import os
import signal
import sys
import time

from bgen.errors import UserError

# The launcher ends the other ranks as soon as one has ended, so the others leave rank 0 this many seconds to speak.
PATIENCE = 3.0


def report_user_error(error: UserError) -> int:
    """Print ``error: ...`` once for all ranks and return the exit code (2, or the error's own).

    This works before the ranks have met. Rank 0 prints and returns. Any other rank waits: if rank 0 found the mistake
    too, the launcher has ended it by then; if not, the mistake is its own (a missing file on its host), and it prints.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(error.exit_code))
        time.sleep(PATIENCE)
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
    return error.exit_code
