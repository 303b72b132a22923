"""A tracker as a mirror of a run's record: it may be slow, down or gone, and training does not notice.

A process of its own reads ``record.jsonl`` behind the trainer and sends what is new; rank 0 starts it. It has the
lowest priority: MLflow takes seconds to import and to migrate a fresh sqlite file, which as a thread of the trainer
cost a small model a third of its speed.

The trainer writes two lines to it: what to send where, and at the end the run's status. It ends when the trainer does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from bgen.track.mlflow import MlflowRun, what_failed
from bgen.track.target import TITLES, Target
from bgen.track.trackers import TensorBoardRun, WandbRun

# Seconds given to what is left at the end: a fresh sqlite file is migrated first, a server has answered or has not.
CLOSE_SQLITE = 60.0
CLOSE_SERVER = 8.0
# Seconds between two looks at the record.
PACE = 2.0
# Added to the process's niceness: the lowest priority.
NICENESS = 19
# Longest pause between attempts when the server is down, in seconds.
PAUSE = 60.0


class Mirror:
    """The process, as the trainer sees it; it is started at once."""

    def __init__(self, target: Target) -> None:
        self.target = target
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bgen.track.mirror", str(NICENESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # what Ctrl-C ends is the trainer, which says what status that is
        )
        self._write(json.dumps(asdict(target)))

    def close(self, status: str) -> str | None:
        """Let it send what is left within a time limit; return a line that says what went wrong, if anything did.

        Parameters
        ----------
        status
            MLflow's status for the run: FINISHED, KILLED or FAILED.
        """
        self._write(status)
        local = self.target.uri.startswith("sqlite") or self.target.kind != "mlflow"
        limit = CLOSE_SQLITE if local else CLOSE_SERVER
        try:
            said, _ = self._process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said, _ = self._process.communicate()
        reports: list[dict[str, Any]] = [json.loads(line) for line in said.splitlines()]
        if reports and reports[-1]["complete"]:
            return None
        reason = "no answer in time"
        if reports and reports[-1]["failures"]:
            reason = f"{reports[-1]['failures']} failed attempts, last: {reports[-1]['error']}"
        return (
            f"{TITLES[self.target.kind]} {self.target.place} did not receive everything ({reason}). The record is "
            f"complete: {self.target.record}{'; `bgen track sync` sends it' if self.target.kind == 'mlflow' else ''}."
        )

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; close() says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


class Follower:
    """The work of the process: send what is new until the run's status is given."""

    def __init__(self, run: MlflowRun | TensorBoardRun | WandbRun, orders: IO[str]) -> None:
        self._run, self._orders = run, orders
        self._failures, self._error = 0, ""
        self._status = ""
        self._told = threading.Event()

    def follow(self) -> None:
        """Return when the status was given and an attempt made to send everything."""
        threading.Thread(target=self._listen, daemon=True).start()
        pause, seen = 1.0, -1
        while True:
            closing = self._told.is_set()
            wait = PACE
            size = Path(self._run.target.record).stat().st_size
            if size != seen or closing:
                try:
                    self._run.connect()
                    self._run.send()
                    if closing:
                        self._run.finish(self._status)
                        self._report(complete=True)
                        return
                    pause, seen = 1.0, size
                except Exception as error:  # whatever a tracker raises, training goes on
                    self._failures += 1
                    self._error = what_failed(error)
                    wait, pause = pause, min(2 * pause, PAUSE)
            if closing:
                self._report()
                return
            self._told.wait(wait)

    def _listen(self) -> None:
        status = self._orders.readline().strip()
        if not status:  # the trainer is dead
            os._exit(1)
        self._status = status
        self._report()  # of what was until now: the trainer may not wait for the last attempt
        self._told.set()

    def _report(self, complete: bool = False) -> None:
        report = {"complete": complete, "failures": self._failures, "error": self._error}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(report), flush=True)


def main() -> None:
    """Follow the record that the first line of the input names; the argument is how nice to be."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):  # Slurm sends them to all processes of a step
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(int(sys.argv[1]))
    target = Target(**json.loads(sys.stdin.readline()))
    kinds: dict[str, Any] = {"mlflow": MlflowRun, "tensorboard": TensorBoardRun, "wandb": WandbRun}
    Follower(kinds[target.kind](target), sys.stdin).follow()


if __name__ == "__main__":
    main()
