"""Starting the scenarios of scenarios.py with the launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import prefork

from bgen.track import record

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
LIMIT = 280


def environment() -> dict[str, str]:
    paths = [str(HERE.parents[1]), str(HERE.parent / "multiprocess"), *filter(None, [os.environ.get("PYTHONPATH")])]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        # Without it, gloo groups do not come back after a restart.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def torchrun(ranks: int, *options: str) -> list[str]:
    return prefork.torchrun(ranks, *options)


def start(launcher: list[str], scenario: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    command = [*launcher, str(HERE / "scenarios.py"), scenario, str(folder)]
    return subprocess.Popen(command, env=environment(), text=True, stderr=subprocess.PIPE, **options)


def launch(launcher: list[str], scenario: str, folder: Path) -> tuple[int, str]:
    """Exit code and what was said."""
    with start(launcher, scenario, folder, stdout=subprocess.DEVNULL) as process:
        try:
            _, said = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    return process.returncode, said


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"result_{rank}.json").read_text())
    return found


def rows(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Rows of the record: of an event, or the training rows."""
    path = folder / "run" / "record.jsonl"
    if event is not None:
        return [row for row in record.read(path) if row.get("event") == event]
    return [row for row in record.read(path) if row["kind"] == "train"]
