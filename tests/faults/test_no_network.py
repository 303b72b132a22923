"""Training and the demo contact nothing but this machine: they run without a route, and connect nowhere else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

WATCH = """
import json, os, sys
def watch(event, arguments):
    if event == "socket.connect":
        with open(os.environ["CONNECTED"], "a") as file:
            file.write(json.dumps(repr(arguments[1])) + "\\n")
sys.addaudithook(watch)
"""
"""A sitecustomize.py: every Python writes down where it connects to."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("unshare") or subprocess.run(["unshare", "--net", "true"], check=False).returncode != 0,
        reason="a network of its own needs root",
    ),
]


def alone(folder: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run Python with a loopback and no route; return what it did, and the addresses that Python connected to."""
    (folder / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    seen = folder / "connected.jsonl"
    seen.touch()
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "CONNECTED": str(seen), "HOME": str(folder)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    inside = 'ip link set lo up && exec "$@"'
    command = ["unshare", "--net", "sh", "-c", inside, "sh", sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return done, [json.loads(line) for line in seen.read_text(encoding="utf-8").splitlines()]


def only_here(addresses: list[str]) -> bool:
    return all(address.startswith(("('127.", "('::1", "('localhost", "'/", "b'", "''")) for address in addresses)


def test_what_connects_is_seen(tmp_path: Path) -> None:
    code = "import socket; socket.create_connection(('198.51.100.1', 9))"  # an address of nobody
    done, addresses = alone(tmp_path, "-c", code)
    assert "unreachable" in done.stderr
    assert addresses == ["('198.51.100.1', 9)"]
    assert not only_here(addresses)


def test_training(demo: Any, tmp_path: Path, empty_mlflow: Path) -> None:
    shutil.copy(empty_mlflow, tmp_path)  # making one may take longer than training waits at its end
    quick = ["train.steps=20", "train.global_batch=64", "train.eval_every=10", "track.progress=false"]
    done, addresses = alone(
        tmp_path, "-m", "bgen", "train", "demo/vae", f"out={tmp_path / 'run'}", f"data.store={demo.store}", *quick
    )
    assert done.returncode == 0, done.stderr
    assert only_here(addresses), addresses
    sent, addresses = alone(tmp_path, "-m", "bgen", "track", "sync", tmp_path / "run")  # what a busy machine left over
    assert sent.returncode == 0, sent.stderr
    assert "did not receive everything" not in sent.stderr
    assert only_here(addresses), addresses


def test_the_demo(tmp_path: Path) -> None:
    done, addresses = alone(tmp_path, "-m", "bgen", "demo", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "report" / "report.html").is_file()
    assert only_here(addresses), addresses
