"""What people see while they wait, and what notebooks show of tables: progress bars, and HTML of what prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

from bgen.progress import Progress

WIDTH = 140
"""Columns of a table in a notebook; wider ones wrap."""

_FORMAT = '<pre style="font-family: monospace; line-height: 1.25; white-space: pre">{code}</pre>'


@contextmanager
def progress_bar(console: Any = None) -> Iterator[Progress]:
    """Give a function that shows a progress bar per kind of work on a console of rich; None: where rich prints."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance


def as_html(*shown: Any) -> str:
    """Return what rich would print of tables and texts as HTML, for ``_repr_html_``."""
    from rich.console import Console

    console = Console(record=True, file=StringIO(), width=WIDTH, markup=False, emoji=False, force_jupyter=False)
    for one in shown:
        console.print(one, highlight=False)
    return console.export_html(inline_styles=True, code_format=_FORMAT)
