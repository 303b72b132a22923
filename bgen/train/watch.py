"""Watching the ranks: stacks of those that hang, the name of a slow one, the load of every host."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bgen.distributed import world as ranks
from bgen.errors import UserError

# The ranks that wait for a hanging one fail after the time-out of the collective; the hanging one is given so many
# seconds more, so that it is the others who speak first. Launchers kill it 30 s after them.
GRACE = 5.0


class Watchdog:
    """Writes the stacks of all threads and ends the process when nothing happened for too long.

    It lives in a thread of C code, so it works also where Python itself hangs.

    Parameters
    ----------
    folder
        ``stacks`` folder of the run; the file is removed at the end if nothing hung.
    """

    def __init__(self, folder: Path) -> None:
        here = ranks.current()
        self.path = folder / f"rank_{here.rank}.txt"
        self._head = f"rank {here.rank} of {here.size}, host {socket.gethostname()}, process {os.getpid()}\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("w", encoding="utf-8")
            self._stream.write(self._head)
            self._stream.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}.") from error
        self._armed = -1e9
        self._seconds = 0.0
        self._closed = threading.Event()
        threading.Thread(target=self._say_so, name="bgen-watchdog", daemon=True).start()

    def beat(self, seconds: float) -> None:
        """Say that this process lives and will say so again within ``seconds``."""
        now = time.monotonic()
        # Setting the alarm costs a thread: often enough is when a tenth of the time is over.
        if seconds != self._seconds or now - self._armed > 0.1 * seconds:
            faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=self._stream)
            self._armed, self._seconds = now, seconds

    def _say_so(self) -> None:
        """Say, before this process ends for it, that nothing happened for too long, if Python can still say so."""
        while not self._closed.wait(min(1.0, GRACE / 4)):
            if self._seconds and time.monotonic() - self._armed > self._seconds + GRACE / 2:
                print(
                    f"error: nothing happened for {self._seconds:g} s, so this process ends. The stacks of all its "
                    f"threads are in {self.path}.",
                    file=sys.stderr,
                    flush=True,
                )
                return

    def dump(self, error: BaseException) -> None:
        """Write what ended this rank and where it was raised, innermost call first, and the stacks of all threads."""
        message = str(error)
        kind = "Timeout" if "timed out" in message.lower() else type(error).__name__
        frames = reversed(traceback.extract_tb(error.__traceback__))
        stack = "".join(f'  File "{frame.filename}", line {frame.lineno} in {frame.name}\n' for frame in frames)
        with contextlib.suppress(OSError):  # what ended the rank is raised after this, also where the disk is full
            self._stream.write(f"{kind}: {message.strip()}\n{stack}")
            self._stream.flush()
        faulthandler.dump_traceback(file=self._stream)

    def close(self) -> None:
        """Stop to watch."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # a full disk; or other ranks have their files in the folder
            self._stream.close()
            if self.path.read_text(encoding="utf-8") == self._head:
                self.path.unlink()
                self.path.parent.rmdir()


@dataclass
class _Own:
    """What a rank tells the others: its host and place there, seconds of its own work a step, load of the host."""

    host: str
    local_rank: int
    seconds: float
    load: dict[str, float]


class HostReport:
    """Compares the ranks' time for their own work, and gathers the hosts' load.

    Own work is waiting for data and the forward pass of a step: in the rest, ranks wait for each other (at ZeRO 3 also
    in the forward pass, which evens them out).

    Parameters
    ----------
    ratio
        A rank is slow if it takes so many times the median of the others.
    system
        Whether to gather the load.
    """

    def __init__(self, ratio: float, system: bool) -> None:
        self.ratio = ratio
        self._load = Load() if system and ranks.current().local_rank == 0 else None
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float) -> None:
        """Count one step's own work."""
        self._seconds += seconds
        self._steps += 1

    def gather(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Gather from all ranks: figures for the record, and, if a rank is slow, which one, where and how slow."""
        own = _Own(
            socket.gethostname(),
            ranks.current().local_rank,
            self._seconds / max(1, self._steps),
            {} if self._load is None else self._load.read(),
        )
        self._seconds, self._steps = 0.0, 0
        everyone = ranks.gather(own)
        seconds = [each.seconds for each in everyone]
        figures: dict[str, Any] = {"own_s_min": round(min(seconds), 6), "own_s_max": round(max(seconds), 6)}
        hosts = [each for each in everyone if each.local_rank == 0]
        for number, each in enumerate(hosts):
            figures |= {f"node{number}/{name}": round(value, 3) for name, value in each.load.items()}
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = seconds[:slowest] + seconds[slowest + 1 :]
        # Milliseconds are noise.
        if not others or seconds[slowest] < max(self.ratio * statistics.median(others), 0.005):
            return figures, None
        return figures, {
            "rank": slowest,
            "host": everyone[slowest].host,
            "seconds": round(seconds[slowest], 4),
            "median": round(statistics.median(others), 4),
        }


class Load:
    """This host's load since the last call: CPU, memory, disk, network, and the GPUs' memory."""

    def __init__(self) -> None:
        psutil.cpu_percent()
        self._before = self._counters()
        self._when = time.monotonic()

    @staticmethod
    def _counters() -> dict[str, float]:
        disk, net = psutil.disk_io_counters(), psutil.net_io_counters()
        return {
            "disk_read": disk.read_bytes if disk else 0,
            "disk_write": disk.write_bytes if disk else 0,
            "net_received": net.bytes_recv if net else 0,
            "net_sent": net.bytes_sent if net else 0,
        }

    def read(self) -> dict[str, float]:
        """``cpu_percent``, ``memory_gb``, MB/s of disk and network, ``gpu_memory_gb`` where there are GPUs."""
        now, counters = time.monotonic(), self._counters()
        seconds = max(now - self._when, 1e-9)
        figures = {"cpu_percent": psutil.cpu_percent(), "memory_gb": psutil.virtual_memory().used / 1e9}
        figures |= {f"{name}_mb_s": (counters[name] - self._before[name]) / 1e6 / seconds for name in counters}
        if torch.cuda.is_available():
            used = (torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count()))
            figures["gpu_memory_gb"] = sum(total - free for free, total in used) / 1e9
        self._before, self._when = counters, now
        return figures
