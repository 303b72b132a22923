"""Mistakes that the tests must find: each is put into a copy of the tree, and its tests are run on it.

``python tests/mutants.py`` runs all of them, ``python tests/mutants.py M3 T5`` some. A mutant whose tests pass has
survived: what it breaks is not tested. :mod:`test_mutants` runs them all, as a slow test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """``old`` in ``file`` becomes ``new``: the mistake ``what``, which one of ``tests`` must find."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutants() -> list[Mutant]:
    """Return all, from ``mutants.yaml``."""
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return [Mutant(**row | {"tests": tuple(row["tests"])}) for row in rows]


def survivors(names: Sequence[str] = ()) -> list[Mutant]:
    """Run mutants (default: all) and return those whose tests passed; says what each did."""
    chosen = [mutant for mutant in read_mutants() if not names or mutant.name in names]
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        for part in ("bgen", "data_tools", "configs", "launch", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, tree / part)
        for mutant in chosen:
            path = tree / mutant.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutant.old) != 1:
                raise ValueError(f"{mutant.name}: {mutant.file} does not hold once what is to be changed")
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            passed = _pass(tree, mutant.tests)
            path.write_text(text, encoding="utf-8")
            print(f"{mutant.name} {'SURVIVED' if passed else 'killed'}: {mutant.what}", flush=True)
            alive += [mutant] if passed else []
    return alive


def _pass(tree: Path, tests: Sequence[str]) -> bool:
    """Whether the tests pass on a tree."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    # Compiled loops of the tree are kept apart, and from one mutant to the next: a change of the file compiles it anew.
    environment |= {"NUMBA_CACHE_DIR": str(tree.parent / "numba"), "BGEN_REAL_DATA": str(tree / "none")}
    options = ["-x", "-q", "-p", "no:cacheprovider", "--numprocesses", "0"]
    command = [sys.executable, "-m", "pytest", *tests, *options]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(tests)} did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(1 if survivors(sys.argv[1:]) else 0)
