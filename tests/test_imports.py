"""The import arrows of the folder tree: a folder may import those before it, never those after it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [
    "config",
    "distributed",
    "data",
    "nn",
    "flow",
    "models",
    "hub",
    "checkpoint",
    "track",
    "train",
    "evaluate",
    "tasks",
    "bench",
]
NEED_TORCH = [
    "batch",
    "buffers",
    "loader",
    "memory",
    "packed",
    "skip",
    "to_anndata",
    "trajectory_batch",
    "trajectory_loader",
]
"""Modules of bgen/data that need torch; data_tools may import all the others, which must not."""

TORCH_FREE = sorted({path.stem for path in (ROOT / "bgen" / "data").glob("*.py")} - {*NEED_TORCH, "__init__"})

FILES = sorted([*(ROOT / "bgen").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")])


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path: Path) -> list[str]:
    parts = path.relative_to(ROOT).parts
    found = []
    for name in imports(path):
        target = name.split(".")
        if target[0] == "deepspeed" and parts != ("bgen", "train", "engine.py"):
            found.append(f"{name}: only bgen/train/engine.py knows DeepSpeed")
        if target[0] == "mlflow" and parts[:2] != ("bgen", "track"):
            found.append(f"{name}: only bgen/track knows MLflow")
        if parts[0] == "data_tools":
            if target[0] == "torch":
                found.append(f"{name}: data_tools needs no torch")
            free = target[1:2] in ([], ["config"], ["__version__"], ["cpus"], ["data"])
            free &= target[1:2] != ["data"] or len(target) == 2 or target[2] in TORCH_FREE
            if target[0] == "bgen" and not free:
                found.append(
                    f"{name}: data_tools may import bgen.config, bgen.cpus and the torch-free part of bgen.data"
                )
            continue
        if len(parts) == 2:
            continue  # bgen/cli.py and bgen/__init__.py may import everything
        here = FOLDERS.index(parts[1])
        if target[0] == "data_tools" and parts[1] not in ("tasks", "bench"):
            found.append(f"{name}: bgen/{parts[1]} does not write stores")
        if target[0] == "bgen" and len(target) > 1 and target[1] in FOLDERS and FOLDERS.index(target[1]) > here:
            found.append(f"{name}: bgen/{parts[1]} stands before bgen/{target[1]}")
        if target[:2] == ["bgen", "cli"]:
            found.append(f"{name}: nothing imports the command line")
        if parts[1] == "data" and target[0] == "torch" and path.stem in TORCH_FREE:
            found.append(f"{name}: {path.name} is for data_tools too, which has no torch")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    assert violations(path) == []


def test_a_wrong_arrow_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    bad = tmp_path / "bgen" / "data" / "order.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    import torch\n    import deepspeed\n    from bgen.train import trainer\n")
    assert len(violations(bad)) == 4


def test_the_tree_is_the_one_of_the_design() -> None:
    there = {path.name for path in (ROOT / "bgen").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert there <= set(FOLDERS)
