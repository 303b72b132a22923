"""Run tutorial notebooks from top to bottom and keep what they show: ``python tests/docs/run_notebooks.py FILE.ipynb``.

Whoever changes a notebook, or what it shows, runs this and commits it; tests/tasks/test_tutorial.py runs the same.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SECONDS = 3600
"""That one cell may take, on a machine with much else to do."""


def run(path: Path, folder: Path) -> Any:
    """Run the cells of a notebook in a process of their own; return it with what they showed.

    Parameters
    ----------
    folder
        Where it writes; the command ``bgen``, as its cells call it, is put there for this checkout.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails.
    """
    command = folder / "bgen"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bgen "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(folder),
    }
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
    return notebook


def main(paths: list[str]) -> None:
    """Run each notebook and write it in its place."""
    for path in map(Path, paths):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(run(path, Path(folder)), path)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
