from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hosts import Hosts, missing
from runs import LIMIT, ROOT, losses, overrides


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Three hosts; skips where they cannot be made."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Hosts(3, tmp_path / "hosts") as made:
        yield made


@pytest.fixture(scope="module")
def one_host(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the undisturbed run: one process, no launcher."""
    out = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "bgen", "train", "demo/vae", *overrides(demo.store, out, 400)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return losses(out)
