"""The last bit: what is compiled now and what was compiled before and comes from numba's cache give the same floats.

numba links a compiled helper into its caller and optimises it once more. In the process that compiles, the caller may
run the copy that was optimised once, in others the one optimised twice; where LLVM may reorder sums, the two can differ
in the last bit. A helper that is always inlined exists in its caller only.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import pytest
from numba.core.registry import CPUDispatcher

from bgen.track.record import read

ROOT = Path(__file__).resolve().parent.parent
LOOPS = Path(__file__).with_name("compiled_loops.py")


def compiled() -> Iterator[CPUDispatcher]:
    """Yield every compiled function of bgen and data_tools."""
    for path in [*(ROOT / "bgen").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")]:
        if "numba.njit" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            yield from (value for value in vars(module).values() if isinstance(value, CPUDispatcher))


def called_by(caller: CPUDispatcher) -> Iterator[CPUDispatcher]:
    """Yield the compiled functions that a compiled function names, directly or through a module."""
    names, known = caller.py_func.__code__.co_names, caller.py_func.__globals__
    for name in names:
        value = known.get(name)
        candidates = [getattr(value, other, None) for other in names] if isinstance(value, ModuleType) else [value]
        yield from (found for found in candidates if isinstance(found, CPUDispatcher))


def not_inlined(functions: Iterable[CPUDispatcher]) -> set[str]:
    """Return the helpers with fast mathematics that another compiled function calls and that are not always inlined."""
    helpers = {helper for function in functions for helper in called_by(function)}
    return {
        f"{helper.py_func.__module__}.{helper.py_func.__name__}"
        for helper in helpers
        if helper.targetoptions.get("fastmath")
        and not helper.targetoptions.get("parallel")
        and not helper.targetoptions.get("forceinline")
    }


def test_helpers_with_fast_mathematics_are_inlined() -> None:
    functions = list(compiled())
    assert {"_forward", "_log1p_of", "_dot"} <= {function.py_func.__name__ for function in functions}
    assert not_inlined(functions) == set()


@numba.njit(fastmath=True)
def shared(x: Any) -> Any:
    return x + 1


@numba.njit(fastmath=True, forceinline=True)
def inlined(x: Any) -> Any:
    return x + 1


@numba.njit
def plain(x: Any) -> Any:
    return x + 1


@numba.njit(fastmath=True)
def caller(x: Any) -> Any:
    return shared(x) + inlined(x) + plain(x)


def test_a_helper_that_is_not_inlined_is_seen() -> None:
    assert not_inlined([caller, plain]) == {f"{__name__}.shared"}


def environment(cache: Path) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "loops", ["forward", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nb", "sparse", "thinning", "ssd"))]
)
def test_compiling_and_loading_give_the_same_bits(loops: str, tmp_path: Path) -> None:
    command = [sys.executable, LOOPS, loops]
    found = []
    for _ in ("empty", "filled"):
        done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert any(tmp_path.rglob("*.nbi")), "nothing was kept for the second process"
    assert found[0] == found[1]


@pytest.mark.slow
def test_compiling_and_loading_give_the_same_losses(demo: Any, tmp_path: Path) -> None:
    """Both stages end to end; the flow is a hybrid over trajectories, on the VAE that was trained first."""
    common = [f"data.store={demo.store}", "train.steps=12", "train.global_batch=96", "train.log_every=1"]
    common += ["train.eval_every=0", "train.patience=0", "track.mlflow=false", "track.progress=false"]
    hybrid = (
        "flow.backbone={name: hybrid, width: 32, layers: 1, time: {scale: 24.0, tokens: 2}, mamba2: {head_width: 16}}"
    )
    stages = {
        "vae": ["demo/vae"],
        "flow": [
            *("trajectories", f"flow.vae={tmp_path / 'empty' / 'vae'}", hybrid, "train.ema=0"),
            "data.trajectories={system: [donor], times: 3, cells: 16}",
        ],
    }
    losses: dict[str, list[list[float]]] = {name: [] for name in stages}
    for kept in ("empty", "filled"):
        for name, arguments in stages.items():
            out = tmp_path / kept / name
            command = [sys.executable, "-m", "bgen", "train", *arguments, f"out={out}", *common]
            here = environment(tmp_path / "cache")
            done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            losses[name].append([row["loss"] for row in read(out / "record.jsonl") if row["kind"] == "train"])
    for name, (first, second) in losses.items():
        assert len(first) == 12, name
        assert first == second, name
