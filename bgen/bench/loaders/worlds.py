"""``bgen bench growth --world``: ranks of large worlds, on what a store of a billion cells says of its chunks.

A rank is what it is in training, except that nothing is decoded: it holds the first cell of every chunk, makes the
order of the epoch and of its lanes, and walks through its windows step by step. Ranks need not know of one another, so
the first, the middle and the last one of a world stand for all; each runs in a process of its own, one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bgen.bench.loaders.memory import measure
from bgen.errors import UserError
from bgen.files import write_result
from bgen.order.cells import Members, Order, Window

CELLS = 1_000_000_000
CHUNK, WINDOW = 256, 16
"""Cells of a chunk, chunks of a window."""

SHARE, STEPS = 4096, 256
"""Cells of a rank's step, and steps."""


def walk(cells: int, world: int, rank: int, lanes: int, *, share: int = SHARE, steps: int = STEPS) -> dict[str, float]:
    """Let one rank go through its first steps.

    Returns
    -------
    dict
        ``first`` and ``step``: CPU seconds of the first step and, on average, of a later one; ``decoded``: cells that
        the rank decodes for each that it uses, of the windows that it begins and ends in these steps (NaN: there is
        none).
    """
    began = time.thread_time()
    first_cell = np.append(np.arange(0, cells, CHUNK), cells)
    order = Order(Members.of(range(cells), first_cell), share * world, lanes, WINDOW, 0, "simulated/train")
    held: dict[int, Window] = {}  # of each lane the window that it is in
    used: dict[tuple[int, int, int], int] = {}
    decoded: dict[tuple[int, int, int], int] = {}
    at_first: set[tuple[int, int, int]] = set()
    first = 0.0
    for step in range(steps):
        now = set()
        for run in order.runs(step, rank * share, (rank + 1) * share):
            if run.window not in used:
                held[run.window[1]] = window = order.read_window(run.window)
                decoded[run.window] = int((first_cell[window.chunks + 1] - first_cell[window.chunks]).sum())
            used[run.window] = used.get(run.window, 0) + run.stop - run.start
            now.add(run.window)
        if step == 0:
            at_first, first = now, time.thread_time() - began
    whole = used.keys() - at_first - now
    taken = sum(used[key] for key in whole)
    later = (time.thread_time() - began - first) / max(steps - 1, 1)
    return {
        "first": first,
        "step": later,
        "decoded": sum(decoded[key] for key in whole) / taken if taken else float("nan"),
    }


def simulate(
    out: Path,
    worlds: Sequence[int],
    *,
    cells: int = CELLS,
    lanes: int | None = None,
    steps: int = STEPS,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Simulate ranks of several worlds, print a table, and write ``worlds.json`` into ``out``.

    Parameters
    ----------
    cells
        Cells of the store.
    lanes
        Lanes of the order; default: as many as the largest world has ranks.
    steps
        Steps of each rank.

    Raises
    ------
    UserError
        If a process fails.
    """
    of = lanes or max(worlds)
    rows = []
    for world in worlds:
        ranks = sorted({0, world // 2, world - 1})
        found = [_apart({"cells": cells, "world": world, "rank": r, "lanes": of, "steps": steps}) for r in ranks]
        most = {key: max(one[key] for one in found) for key in found[0]}
        rows.append({"world": world, "lanes": of, "cells": cells, "ranks": ranks, **most})
        say(f"{world:,} ranks: {most['own'] / 1e6:,.0f} MB, {most['decoded']:.2f} x decoded")
    say(table(rows))
    out.mkdir(parents=True, exist_ok=True)
    write_result(out / "worlds.json", json.dumps(rows, indent=1) + "\n")
    say(f"Written: {out / 'worlds.json'}")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return what was found as a Markdown table."""
    heads = ["ranks", "lanes", "memory of a rank", "CPU of the first step", "of a later one", "decoded for a cell used"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        lines.append(
            f"| {row['world']:,} | {row['lanes']:,} | {row['own'] / 1e6:,.0f} MB | {row['first']:.1f} s |"
            f" {1e3 * row['step']:.2f} ms | {row['decoded']:.2f} |"
        )
    return "\n".join(lines)


def _apart(job: dict[str, int]) -> dict[str, float]:
    """Run one rank in a process of its own.

    Raises
    ------
    UserError
        If it fails.
    """
    command = [sys.executable, "-m", "bgen.bench.loaders.worlds", json.dumps(job)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"A rank of {job['world']:,} failed: what it said stands above.")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(job: dict[str, int]) -> None:
    """Walk, and write a line of JSON of what was found and of the memory that it took."""
    walk(100_000, 2, 0, 2, steps=2)  # what is imported and compiled late
    found: dict[str, float] = {}

    def work(_: Path) -> object:
        found.update(walk(**job))
        return None

    print(json.dumps({**measure(work, Path()), **found}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
