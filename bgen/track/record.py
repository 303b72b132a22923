"""The record of a run: one JSON object a line in ``record.jsonl``.

Every row has ``kind`` ("train", "valid", "hosts" or "event"), ``step`` (optimiser steps done), ``time`` (Unix seconds):

- ``train``: means over the steps since the last such row: ``loss`` and the model's other losses, ``lr``, ``grad_norm``,
  ``skipped`` (steps skipped so far), and the figures of :mod:`bgen.track.throughput`.
- ``valid``: the held-out losses.
- ``hosts``: of every host ``nodeN/...``, its load, and over ranks the shortest and longest time of own work a step.
- ``event``: ``event`` says what happened ("start", "resume", "skipped", "checkpoint", "interrupted", "end", ...). The
  first row of all is "start", whose ``run`` is this run's identifier for its whole life.

A resumed run drops the rows after the step that it resumes from, so the file reads as one uninterrupted run.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """All rows; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


class Record:
    """Appends rows to the file; one writer only."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._stream = path.open("a", encoding="utf-8")

    def append(self, kind: str, step: int, values: Row) -> Row:
        """Write one row and return it. Numbers must be finite."""
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()
        return row

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def truncate(path: Path, step: int) -> None:
    """Drop the rows after ``step``, and a last line that was cut off; the file is replaced at once or not at all."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    temporary.replace(path)
