"""The walls of the house: which folder may import which, and what whole folders must not know.

A floor may import those above it in :data:`FLOORS`, never those below. Every import counts, wherever it stands.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    "bgen.version",
    "bgen.errors",
    "bgen.names",
    "bgen.arrays",
    "bgen.progress",
    "bgen.notebooks",
    "bgen.files",
    "bgen.cgroups",
    "bgen.cpus",
    "bgen.memory",
    "bgen.passwords",
    "bgen.config",
    "bgen.genes",
    "bgen.order",
    "bgen.store",
    "data_tools",
    "bgen.data",
    "bgen.nn",
    "bgen.flow",
    "bgen.models",
    "bgen.distributed",
    "bgen.checkpoint",
    "bgen.track",
    "bgen.hub",
    "bgen.effects",
    "bgen.train",
    "bgen.evaluate",
    "bgen.tasks",
    "bgen.operate",
    "bgen.bench",
    "bgen.demo",
    "bgen.plot",
    "bgen.api",
    "bgen.serve",
    "bgen.cli",
    "bgen",
]
"""From the ground to the roof; "bgen" is what ``import bgen`` and ``python -m bgen`` give."""

TORCH_FREE = ["bgen/config", "bgen/genes", "bgen/order", "bgen/store", "data_tools"]
DEEPSPEED = "bgen/train/engine"
MLFLOW = "bgen/track"

MOST_FILES = 14
"""Files of code in a folder, at most."""

HEAVY = {
    "torch", "deepspeed", "mlflow", "matplotlib", "anndata", "numba", "ot", "scipy", "sklearn", "zarr", "distributed",
    "rich", "torchdiffeq", "zstandard", "cell_eval", "scib_metrics", "transformers", "harmonypy", "scvi",
    "rdkit", "numcodecs", "pyarrow", "tiledbsoma", "huggingface_hub", "uvicorn", "wandb",
}  # fmt: skip
"""Third-party packages that a function may import itself, since a command that does not need them need not wait."""

LATE = {
    "bgen/__init__.py": "`import bgen` is quick; what it offers is loaded when it is asked for",
    "bgen/cli": "`--help` needs no torch: a verb imports what it calls",
    "bgen/tasks/load.py": "a model is loaded without DeepSpeed, and trains with it",
    "bgen/bench/loaders/worker.py": "runs also in a Python that has a peer but not bgen",
    "bgen/bench/speed/versus_worker.py": "runs also in a Python that has a peer but not bgen",
    "bgen/bench/quality/cells_scvi.py": "runs in a Python that has scvi-tools but not bgen",
}
"""Where functions import bgen's modules, or a peer's, themselves; and why."""

FILES = sorted([*(ROOT / "bgen").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")])


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> str:
    """Return the floor that a module stands on."""
    return next((floor for floor in FLOORS[:-1] if module == floor or module.startswith(f"{floor}.")), "bgen")


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield every module (and every name that may be one) that a file imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import by the full name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(files: list[Path], root: Path) -> dict[str, set[str]]:
    """Return for each module the modules of ours that it imports; a package's own names count as the package."""
    modules = {module_of(path, root): path for path in files}
    edges = {}
    for name, path in modules.items():
        found = {target for target in imported(parsed(path.read_text("utf-8"))) if target in modules}
        edges[name] = {target for target in found if target != name and not is_package_above(target, found)}
    return edges


def is_package_above(target: str, found: set[str]) -> bool:
    """Whether ``target`` was found only as the first part of ``from package import module``."""
    return any(other.startswith(f"{target}.") for other in found)


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import one another in a circle (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges.get(module, ()):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(edges):
        if module not in index:
            visit(module)
    return groups


def violations(path: Path, root: Path = ROOT) -> list[str]:
    where = path.relative_to(root).as_posix()
    here = floor_of(module_of(path, root))
    tree = parsed(path.read_text("utf-8"))
    found = []
    for name in imported(tree):
        package = name.split(".")[0]
        if package == "torch" and where.startswith(tuple(f"{folder}/" for folder in TORCH_FREE)):
            found.append(f"{name}: this folder does without torch")
        if package == "deepspeed" and not where.startswith(f"{DEEPSPEED}/"):
            found.append(f"{name}: only {DEEPSPEED} knows DeepSpeed")
        if package == "mlflow" and not where.startswith(f"{MLFLOW}/"):
            found.append(f"{name}: only {MLFLOW} knows MLflow")
        if package in ("bgen", "data_tools") and name != "bgen":
            there = floor_of(name)
            if there != here and there != "bgen" and FLOORS.index(there) > FLOORS.index(here):
                found.append(f"{name}: {here} stands below {there}")
    late = any(where == place or where.startswith(f"{place}/") for place in LATE)
    for inner in [node for node in ast.walk(tree) if is_late(node)]:
        for name in imported(inner):
            package = name.split(".")[0]
            if package in ("bgen", "data_tools") and not late:
                found.append(f"{name}: imported late; stands it in a circle?")
            elif package not in HEAVY and not late:
                found.append(f"{name}: imported late, although it is not heavy")
    return found


def is_late(node: ast.AST) -> bool:
    """Whether a node is a function, or what only a type checker reads (where heavy packages may be imported, too)."""
    only_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or only_for_types


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_down(path: Path) -> None:
    assert violations(path) == []


def test_no_two_files_import_each_other_in_a_circle() -> None:
    assert circles(graph(FILES, ROOT)) == []


def test_no_folder_is_crowded() -> None:
    folders = [path.parent for path in FILES if path.name != "__init__.py"]
    crowded = {str(folder.relative_to(ROOT)): folders.count(folder) for folder in set(folders)}
    assert {name: number for name, number in crowded.items() if number > MOST_FILES} == {}


def test_every_room_has_a_floor() -> None:
    rooms = {floor_of(module_of(path, ROOT)) for path in FILES}
    assert rooms == set(FLOORS)
    roof = {module_of(path, ROOT) for path in FILES if floor_of(module_of(path, ROOT)) == "bgen"}
    assert roof == {"bgen", "bgen.__main__"}


def test_what_does_without_torch_never_loads_it() -> None:
    names = [module_of(path, ROOT) for path in FILES]
    folders = tuple(folder.replace("/", ".") for folder in TORCH_FREE)
    modules = [name for name in names if name.startswith(folders)]
    assert len(modules) > 50
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "print(*sorted({'torch', 'deepspeed', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_wrong_arrows_are_seen(tmp_path: Path) -> None:
    bad = tmp_path / "bgen" / "order" / "cells.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("import deepspeed\nimport mlflow\nimport torch\nfrom bgen.train import trainer\n")
    assert [line.split(":")[0] for line in violations(bad, tmp_path)] == [
        "deepspeed",
        "mlflow",
        "torch",
        "bgen.train",
        "bgen.train.trainer",
    ]
    bad.write_text("def f():\n    import bgen.order.keys\n    import json\n    import numba\n")
    assert [line.split(":")[0] for line in violations(bad, tmp_path)] == ["bgen.order.keys", "json"]
    bad.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bgen.order.keys import mix\n")
    assert len(violations(bad, tmp_path)) == 2  # the module, and the name that may be one


def test_circles_are_seen(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.py", "b.py", "c.py")]
    files[0].write_text("from c import x\n")
    files[1].write_text("def f():\n    import a\n")
    files[2].write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import b\n")
    assert circles(graph(files, tmp_path)) == [["a", "b", "c"]]
