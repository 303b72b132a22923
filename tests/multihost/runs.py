"""What the tests on several hosts train, and how they compare it with one process."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bgen.operate.launch import Launch, launch
from bgen.track import record

ROOT = Path(__file__).resolve().parents[2]
NAMES = "h0,h1,h2"
STEP_TIMEOUT = 10
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BGEN_MARK": "handed on"}
LIMIT = 300


def overrides(store: Path, out: Path, steps: int) -> list[str]:
    train = {"steps": steps, "log_every": 1, "global_batch": 96, "eval_every": 0, "checkpoint_every": 20, "patience": 0}
    train |= {"step_timeout": STEP_TIMEOUT, "start_timeout": 120}
    settings = [f"train.{name}={value}" for name, value in train.items()]
    return [f"out={out}", f"data.store={store}", "track.mlflow=false", *settings]


def render(target: str, demo: Any, out: Path, steps: int, **options: Any) -> Launch:
    options = {"nodes": 3, "settings": [f"hosts={NAMES}"]} | options
    given = overrides(demo.store, out, steps)
    folder = out.with_name(f"{out.name}-{target}")
    return launch("demo/vae", target, device="cpu", overrides=given, out=folder, **options)


def losses(out: Path) -> dict[int, float]:
    rows = record.read(out / "record.jsonl") if (out / "record.jsonl").exists() else []
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def events(out: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in record.read(out / "record.jsonl") if row.get("event") == name]


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while max(losses(out), default=0) < step:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said[-6000:]
    return said


def same(found: dict[int, float], expected: dict[int, float], steps: int) -> None:
    assert sorted(found) == list(range(1, steps + 1))
    # Sums over three ranks are taken in another order than over one, which rounding amplifies from step to step.
    assert [found[step] for step in range(1, 21)] == pytest.approx([expected[step] for step in range(1, 21)], rel=1e-5)
    assert list(found.values()) == pytest.approx([expected[step] for step in found], rel=1e-3)
