"""What the command line's verbs share: where they print, and how they show progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from bgen.progress import Progress

WIDE = 200
"""Columns of what is written to a file or another program, which has no width of its own."""

results = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
"""Standard output: what was asked for."""

notes = Console(stderr=True)
"""Standard error: progress and remarks."""


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Seed = Annotated[int, typer.Option(help="Seed.")]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Give a function that shows a progress bar per kind of work on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance
