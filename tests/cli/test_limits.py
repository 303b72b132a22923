"""Every number of the command line has limits, and what lies beyond them is one message and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import pytest
import typer

from bgen.cli.main import app
from bgen.files import slashes_in_names


def options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, below in getattr(command, "commands", {}).items():
        yield from options(below, (*path, name))
    if not hasattr(command, "commands"):
        yield from ((" ".join((*path, option.name)), option) for option in command.params)


def kind(option: Any) -> str:
    """What an option takes, as text, in any version of typer."""
    return str(option.bare_type() if hasattr(option, "bare_type") else option.type)


def limits(option: Any) -> tuple[Any, Any]:
    if hasattr(option, "bare_type"):
        return option.min, option.max
    each = getattr(option.type, "types", [option.type])[0]
    return getattr(each, "min", None), getattr(each, "max", None)


def test_every_number_has_limits() -> None:
    numbers = [(name, one) for name, one in options(typer.main.get_command(app)) if "int" in kind(one).lower()]
    numbers += [(name, one) for name, one in options(typer.main.get_command(app)) if "float" in kind(one).lower()]
    assert len(numbers) > 50
    assert [name for name, one in numbers if None in limits(one)] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "MODEL", "--library-size", "1e30"],
        ["generate", "MODEL", "--library-size", "inf"],
        ["generate", "MODEL", "--library-size", "nan"],
        ["generate", "MODEL", "--n", "1000000000000"],
        ["generate", "MODEL", "--seed", "-1"],
        ["generate", "MODEL", "--seed", "99999999999999999999999"],
        ["generate", "MODEL", "--noise", "nan"],
        ["generate", "MODEL", "--guidance", "inf"],
        ["generate", "MODEL", "--steps", "1000000000"],
        ["generate", "MODEL", "--where", "time=1000000"],
        ["generate", "MODEL", "--where", "time=nan"],
        ["generate", "MODEL", "--where", "dose=-3"],
        ["denoise", "MODEL", "CELLS", "--library-size", "inf"],
        ["denoise", "MODEL", "CELLS", "--library-size", "nan"],
        ["embed", "MODEL", "CELLS", "--floor", "nan"],
        ["annotate", "MODEL", "CELLS", "--label", "cell_type", "--threshold", "nan"],
        ["evaluate", "MODEL", "--data", "STORE", "--seeds", "99999999999999999999"],
        ["data", "simulate", "--cells", "100000000000000000000"],
        ["data", "simulate", "--cells", "0"],
    ],
    ids=" ".join,
)
def test_numbers_that_cannot_be_meant(bgen: Any, demo: Any, tmp_path: Path, arguments: list[str]) -> None:
    places = {"MODEL": demo.model, "CELLS": demo.cells, "STORE": demo.store}
    done = bgen(*(places.get(part, part) for part in arguments), "--out", tmp_path / "out.h5ad")
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["s3://bucket/x.h5ad", "gs://bucket/x.h5ad", "y" * 300 + ".h5ad"])
def test_places_that_cannot_be_written(
    bgen: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["generate", demo.model, "--n", 2, "--out", out],
        ["embed", demo.model, demo.cells, "--out", out],
        ["data", "simulate", "--preset", "tiny", "--out", out],
        ["data", "build", demo.cells, "--out", out],
        ["data", "to-anndata", demo.store, "--out", out],
        ["export", demo.flow, "--out", out],
        ["evaluate", demo.model, "--data", demo.store, "--out", out],
    ):
        done = bgen(*arguments)
        assert done.code == 2, done
        assert "is an address" in done.err or "too long" in done.err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "cells.h5ad"), "cells.h5ad: Permission denied."),
        (OSError(30, "Read-only file system", "out"), "out: Read-only file system."),
        (OSError(28, "No space left on device"), "No space left on device."),
        (MemoryError("Unable to allocate 9 TiB"), "not enough memory for this (Unable to allocate 9 TiB)"),
        (RuntimeError("CUDA out of memory. Tried\nmore"), "not enough memory for this (CUDA out of memory. Tried)."),
    ],
)
def test_what_the_system_refuses_is_one_message(
    bgen: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("bgen.store.open.open_manifest", fails)
    done = bgen("data", "info", "store")
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err


def test_names_of_columns_reach_the_terminal_as_they_are(bgen: Any, demo: Any, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(demo.cells)[:100].copy()
    cells.obs["[/x]"] = "a"
    cells.obs["evil\x1b]0;title\x07"] = "b"
    with slashes_in_names():
        cells.write_h5ad(tmp_path / "my.h5ad")
    out = tmp_path / "store[/nope]"
    done = bgen("data", "build", tmp_path / "my.h5ad", "--out", out, "--batch", "[/x]", "--organism", "synthetic")
    assert done.code == 0, done
    told = bgen("data", "info", out)
    assert told.code == 0, told
    assert "[/x]" in told.out
    assert "\\x1b]0;title\\x07" in told.out
    assert "\x1b]" not in done.out + done.err + told.out
