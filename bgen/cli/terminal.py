"""What the command line's verbs share: where they print, and how they show progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from bgen.errors import MOST_SEEDS, UserError
from bgen.names import shown
from bgen.notebooks import progress_bar as show_progress
from bgen.progress import Progress

WIDE = 200
"""Columns of what is written to a file or another program, which has no width of its own."""


def open_streams() -> None:
    """Give closed standard streams (``bgen ... >&-``) somewhere to go.

    Otherwise the next file that is opened gets the number of the stream, and whatever prints writes into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


class Terminal(Console):
    """A console that shows names as they are: it follows no markup in a text, and no control character gets through."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a text, or a text in a table, into what is printed."""
        return super().render_str(shown(text), **options)


open_streams()
results = Terminal(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
"""Standard output: what was asked for."""

notes = Terminal(stderr=True)
"""Standard error: progress and remarks."""


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEEDS, help="Seed.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides such as train.steps=500.", show_default=False)]


def parse_scales(texts: Sequence[str] | None) -> dict[str, float] | None:
    """Return the number of each ``column=number``; None: none was given."""
    if texts is None:
        return None
    scales = {}
    for name, value in parse_where(texts).items():
        try:
            scales[name] = float(value)
        except ValueError:
            raise UserError(f"--guidance-of {name}={value}: {value!r} is no number.") from None
    return scales


def parse_where(texts: Sequence[str]) -> dict[str, str]:
    """Read conditions ``column=value``."""
    where = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UserError(f"'{text}' is not a condition: write column=value, such as cell_type=B.")
        where[name.strip()] = value.strip()
    return where


def parse_times(text: str | None) -> list[float] | Literal["all"] | None:
    """Read time points: numbers with commas between, or "all"."""
    if text is None or text == "all":
        return "all" if text else None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--times {text}: write numbers with commas between, such as 0,24,48, or all.") from None


def progress_bar() -> AbstractContextManager[Progress]:
    """Give a function that shows a progress bar per kind of work on standard error."""
    return show_progress(notes)
