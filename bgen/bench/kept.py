"""Figures of a comparison that outlive its process, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bgen.errors import UserError
from bgen.files import require_new_folder, write_result

Figures = dict[str, float]

NAME = "rows.jsonl"
RUN = "run"
"""Folder of what is under way, which is begun anew when a comparison goes on."""


class Kept:
    """Figures of rows and seeds in ``rows.jsonl``, below what they were measured with.

    Parameters
    ----------
    out
        Folder: a new one, or one of before.
    facts
        What the figures depend on, as JSON values.
    resume
        Go on with those that are there.

    Raises
    ------
    UserError
        If the folder is not new, or there is nothing to go on with, or it was measured with other facts.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
        self.figures: dict[tuple[str, int], Figures] = {}
        self._path = out / NAME
        if not resume:
            require_new_folder(out)
            out.mkdir(parents=True, exist_ok=True)
            self._append(facts)
            return
        if not self._path.is_file():
            raise UserError(
                f"--resume: there is no {self._path}, in which an earlier comparison kept what it had found."
            )
        text = self._path.read_text(encoding="utf-8")
        text = text[: text.rfind("\n") + 1]  # without a line that was being written
        write_result(self._path, text)
        before, *lines = (json.loads(line) for line in text.splitlines())
        other = [name for name, value in facts.items() if before.get(name) != value]
        if other:
            raise UserError(
                f"--resume: {self._path} was measured with {other[0]}={before.get(other[0])}, not {facts[other[0]]}."
            )
        self.figures = {(line["row"], line["seed"]): line["figures"] for line in lines}
        shutil.rmtree(out / RUN, ignore_errors=True)  # what was under way when it stopped

    def __contains__(self, of: tuple[str, int]) -> bool:
        """Say whether a row and a seed are there."""
        return of in self.figures

    def add(self, row: str, seed: int, figures: Figures) -> None:
        """Keep what was found."""
        self.figures[row, seed] = figures
        self._append({"row": row, "seed": seed, "figures": figures})

    def runs(self, rows: Iterable[str], seeds: int) -> dict[str, list[Figures]]:
        """Return the figures of rows, a dictionary for each seed."""
        return {row: [self.figures[row, seed] for seed in range(seeds)] for row in rows}

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def is_begun(out: Path) -> bool:
    """Say whether a comparison has kept anything in a folder that another can go on with."""
    path = out / NAME
    return path.is_file() and "\n" in path.read_text(encoding="utf-8")
