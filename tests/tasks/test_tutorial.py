"""The tutorial notebook: what is committed is whole and small, and its cells run as they stand."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "bgen" / "tasks" / "tutorial.ipynb"
MOST_BYTES = 300_000


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def committed() -> Any:
    return json.loads(TUTORIAL.read_text(encoding="utf-8"))


def test_it_is_small() -> None:
    assert TUTORIAL.stat().st_size < MOST_BYTES


def test_it_was_run_from_top_to_bottom_without_an_error(committed: Any) -> None:
    cells = code_cells(committed)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, (
        "a curve of losses, and a map of cells"
    )


def test_it_names_no_place_of_the_machine_it_ran_on(committed: Any) -> None:
    shown = json.dumps([cell["outputs"] for cell in code_cells(committed)])
    assert not [word for word in ("/tmp", "/home", "/root", "site-packages") if word in shown]


def test_its_links_lead_to_pages(committed: Any) -> None:
    text = "".join("".join(cell["source"]) for cell in committed["cells"] if cell["cell_type"] == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    assert not [link for link in links if not (TUTORIAL.parent / link).is_file()]


@pytest.mark.slow
def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "bgen"  # what the cells call, whether this checkout is installed or not
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bgen "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(TUTORIAL, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = json.dumps([cell["outputs"] for cell in code_cells(notebook)])
    assert "Report: report/report.html" in said
    assert list(tmp_path.glob("*/report/report.html"))
