"""The record of a run: one JSON object a line in ``record.jsonl``.

Every row has ``kind`` ("train", "valid", "norms", "hosts" or "event"), ``step`` (optimiser steps done), ``time`` (Unix
seconds):

- ``train``: means over the steps since the last such row: ``loss`` and the model's other losses, ``lr``, ``grad_norm``,
  ``skipped`` (steps skipped so far), and the figures of :mod:`bgen.track.throughput`.
- ``valid``: the held-out losses.
- ``norms``: every ``train.norms`` steps, of each layer of the network: ``gradient/LAYER``, the Euclidean norm of the
  gradient of its parameters before clipping, and ``activation/LAYER``, the root mean square of what it gives.
- ``hosts``: of every host ``nodeN/...``, its load, and over ranks the shortest and longest time of own work a step.
- ``event``: ``event`` says what happened ("start", "resume", "skipped", "checkpoint", "interrupted", "end", ...). The
  first row of all is "start", whose ``run`` is this run's identifier for its whole life.

A resumed run drops the rows after the step that it resumes from, so the file reads as one uninterrupted run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

Row = dict[str, Any]

NOT_MEASURED = ("kind", "step", "time")
PREFIX = {"hosts": "system"}
"""What trackers call the rows of a kind, where it is another word: MLflow shows "system/" on a page of its own."""


def read(path: Path) -> list[Row]:
    """All rows; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def beside(model: Path) -> dict[str, list[Row]]:
    """Return the records of the trainings that made a model directory, where they lie beside it, by stage."""
    places = {"VAE": model.parent / "vae", "flow": model.parent / "flow", "training": model.parent}
    found = {stage: folder / "record.jsonl" for stage, folder in places.items()}
    return {stage: read(path) for stage, path in found.items() if path.is_file()}


def as_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return what rows of training and held-out losses say: a row for each step, columns such as ``train/loss``."""
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["kind"] in ("train", "valid"):
            values = {f"{row['kind']}/{name}": value for name, value in row.items() if name not in NOT_MEASURED}
            steps.setdefault(row["step"], {}).update(values)
    return pd.DataFrame.from_dict(steps, orient="index", dtype=float).rename_axis("step").sort_index()


def metrics_of(row: Row) -> list[tuple[str, float, int, int]]:
    """Return name, value, Unix milliseconds and step of each number of a row, as trackers take them."""
    if row["kind"] == "event":
        return []
    moment, kind = int(1000 * row.get("time", time.time())), PREFIX.get(row["kind"], row["kind"])
    return [
        (f"{kind}/{name}", float(value), moment, int(row["step"]))
        for name, value in row.items()
        if name not in NOT_MEASURED and isinstance(value, int | float)
    ]


class Tail:
    """The rows of a record that somebody has not had yet; only whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = self._offset = 0

    def rows(self) -> Iterator[Row]:
        """Yield the rows after those that were kept."""
        self._offset = self._kept
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            self._offset += len(line)
            yield json.loads(line)

    def keep(self) -> None:
        """Say that whatever was yielded has arrived: it is not yielded again."""
        self._kept = self._offset


class Record:
    """Appends rows to the file; one writer only.

    A disk that is full, or away, costs nothing but time: rows that cannot be written are kept, and written before the
    next ones.

    Attributes
    ----------
    trouble
        Why the last attempt to write failed; None if it did not.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.trouble: OSError | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._unwritten = b""

    def append(self, kind: str, step: int, values: Row) -> Row:
        """Write one row and return it. Numbers must be finite."""
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._unwritten += (json.dumps(row, allow_nan=False) + "\n").encode()
        self._write()
        return row

    def _write(self) -> None:
        self.trouble = None
        try:
            while self._unwritten:  # a disk that fills up may take half a row; the other half comes after it
                self._unwritten = self._unwritten[os.write(self._descriptor, self._unwritten) :]
        except OSError as error:
            self.trouble = error

    @property
    def kept(self) -> int:
        """Rows that are not written yet."""
        return self._unwritten.count(b"\n")

    def sync(self) -> OSError | None:
        """Wait until the rows that were written are on the disk, and return what went wrong, if anything did.

        It may be called in another thread.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Write what is left, if that is possible, and close the file."""
        self._write()
        self.sync()
        os.close(self._descriptor)


def truncate(path: Path, step: int) -> None:
    """Drop the rows after ``step``, and a last line that was cut off; the file is replaced at once or not at all."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    temporary.replace(path)
