"""Verbs in blocks under torchrun: two ranks write what one writes, to the last byte, also after one was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_finetuning import HERE, torchrun


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("embed", ["--variance"]),
        pytest.param("annotate", ["--label", "cell_type", "--threshold", "0.7"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_write_what_one_writes(bgen: Any, demo: Any, tmp_path: Path, verb: str, more: list[str]) -> None:
    asked = [verb, demo.model, demo.store, *more]
    assert bgen(*asked, "--out", tmp_path / "one.zarr").code == 0
    both = torchrun("-m", "bgen", *asked, "--out", tmp_path / "two.zarr")
    assert both.returncode == 0, both.stderr[-4000:]
    assert both.stdout.count("600 cells x") == 1  # one of them speaks
    assert both.stderr.count("120 of the model's 120 genes") == 1
    assert files(tmp_path / "two.zarr") == files(tmp_path / "one.zarr")


def test_one_rank_goes_on_where_two_were_killed(bgen: Any, demo: Any, tmp_path: Path) -> None:
    for name in ("model", "store"):
        (tmp_path / name).symlink_to(getattr(demo, name))
    killed = torchrun(HERE / "script.py", "killed_while_embedding", tmp_path)
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr
    done = tmp_path / ".out.zarr.partial/build/done"
    ready = {path.name for path in done.iterdir()}
    assert "0.json" in ready
    assert "2.json" not in ready  # what rank 1 had begun
    first = (tmp_path / ".out.zarr.partial/obsm/X_bgen/0.0").stat().st_ino
    for name in ("out.zarr", "straight.zarr"):
        again = bgen("embed", demo.model, demo.store, "--out", tmp_path / name)
        assert again.code == 0, again
    assert files(tmp_path / "out.zarr") == files(tmp_path / "straight.zarr")
    assert (tmp_path / "out.zarr/obsm/X_bgen/0.0").stat().st_ino == first  # not made again


def test_a_mistake_that_one_rank_meets_ends_both_with_one_message(demo: Any, tmp_path: Path) -> None:
    logs = ["--redirects", "3", "--tee", "3", "--log-dir", tmp_path / "log"]
    asked = ["annotate", demo.model, demo.store, "--label", "no_such", "--out", tmp_path / "out.zarr"]
    done = torchrun(*logs, "-m", "bgen", *asked)
    said = "".join(path.read_text() for path in (tmp_path / "log").glob("*/attempt_0/*/stderr.log"))
    assert done.returncode != 0
    assert said.count("error:") == 1
    assert "There is nothing to learn 'no_such' from" in said
    assert "Traceback" not in said
    assert list(tmp_path.glob("*.zarr")) == list(tmp_path.glob(".*.zarr*")) == []
