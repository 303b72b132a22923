"""What pyproject.toml declares is imported somewhere, and what is imported is declared; nothing is installed here."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

IMPORTED_AS = {
    "cell-eval": "cell_eval",
    "google-crc32c": "google_crc32c",
    "mlflow-skinny": "mlflow",
    "pot": "ot",
    "pyyaml": "yaml",
    "scib-metrics": "scib_metrics",
    "scikit-learn": "sklearn",
}
"""Distributions whose packages have other names."""

NOT_IMPORTED = {
    "alembic": "MLflow migrates its sqlite file with it, and mlflow-skinny does not bring it",
    "einops": "mamba-ssm's kernels import it, and are installed without their dependencies",
    "ipykernel": "the tests start it, to run the tutorial notebooks",
    "mlflow": "the command `mlflow ui`, which mlflow-skinny lacks",
    "myst-nb": ".site/conf.py names it, to read the pages",
    "sphinx": ".site/build.py runs it",
    "sphinx-book-theme": ".site/conf.py names it, for the looks",
    "moto": "the tests run its server as a program",
    "pytest-xdist": "pytest loads it by itself",
    "sqlalchemy": "MLflow keeps its sqlite file with it, and mlflow-skinny does not bring it",
}
"""Distributions that are declared, though no file imports them, and why."""

NOT_DECLARED = {
    "annbatch": "a loader that the bench measures in an environment of its own",
    "bionemo": "a loader that the bench measures in an environment of its own",
    "cellstream": "a loader that the bench measures in an environment of its own",
    "flask": "the tests see by it whether all of MLflow is there, and not only mlflow-skinny",
    "harmonypy": "stands beside an integration where it is installed; it is under the GPL",
    "lightning": "comes with scvi-tools",
    "mamba_ssm": "built for the GPU at hand: see the README",
    "scanpy": "comes with scib-metrics; a test lets it read the neighbours that are written for it",
    "scdataset": "a loader that the bench measures in an environment of its own",
    "scvi": "a model that the bench measures in an environment of its own",
    "transformers": "the bench times a block of it if it is there",
    "zarrs": "annbatch's decoder, in its environment",
}
"""Packages that are imported, though not declared, and why."""

BROUGHT = {"dask": "distributed", "ninja": "deepspeed", "pydantic_core": "pydantic"}
"""Packages that are imported and come, in the version that it needs, with a core dependency."""

AT_ONCE = {
    "bgen/serve/app.py": "`bgen serve` alone imports it, and says what it needs",
    "bgen/models/likelihoods/sparse_triton.py": "imported on GPUs where Triton is, and kernels are made as it is",
    "bgen/nn/gpu/bits_triton.py": "as above",
    "bgen/nn/gpu/draws_triton.py": "as above",
    "bgen/nn/gpu/dropout_triton.py": "as above",
    "bgen/nn/gpu/elementary_triton.py": "as above",
    "bgen/nn/gpu/sparse_triton.py": "as above",
    "bgen/nn/gpu/thinning_triton.py": "as above",
    "bgen/serve/turns.py": "app.py alone imports it",
}
"""Files that import what an extra brings without waiting until it is used, and why."""

TOOLS = {"dev"}
"""Extras of programs that are run on the code."""


def normal(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]) for requirement in requirements}


CORE = declared(PROJECT["dependencies"])
EXTRAS = {extra: declared(found) for extra, found in PROJECT["optional-dependencies"].items() if extra not in TOOLS}


def package(distribution: str) -> str:
    """Return the name that a distribution is imported by."""
    return IMPORTED_AS.get(distribution, distribution.replace("-", "_"))


def named(node: ast.AST) -> list[str]:
    """Return the modules that a node imports, or asks for by a name that is written out."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module and node.level == 0 else []
    if isinstance(node, ast.Call) and node.args:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        asked = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
        if function in ("import_module", "find_spec", "importorskip") and isinstance(asked, ast.Constant):
            return [str(asked.value)]
    return []


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield each foreign package that a file imports, and whether the file cannot be imported without it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        for name in named(node):
            top = name.split(".")[0]
            if top not in OURS and top not in sys.stdlib_module_names:
                yield top, isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in later


OURS = {"bgen", "data_tools"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
FILES = {
    folder: [(path, *found) for path in sorted((ROOT / folder).rglob("*.py")) for found in imports(path)]
    for folder in ("bgen", "data_tools", "tests")
}
IMPORTED = {top for found in FILES.values() for _, top, _ in found}


def test_every_core_dependency_is_imported_by_the_library() -> None:
    by_library = {top for folder in ("bgen", "data_tools") for _, top, _ in FILES[folder]}
    assert {name for name in CORE if package(name) not in by_library} == CORE & NOT_IMPORTED.keys()


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_is_imported(extra: str) -> None:
    unused = {name for name in EXTRAS[extra] if package(name) not in IMPORTED}
    assert unused <= NOT_IMPORTED.keys()


def test_every_imported_package_is_declared() -> None:
    known = {package(name) for name in CORE.union(*EXTRAS.values())}
    assert IMPORTED - known == NOT_DECLARED.keys() | BROUGHT.keys()
    assert set(BROUGHT.values()) <= CORE


def test_what_extras_bring_is_imported_only_where_it_is_used() -> None:
    core = {package(name) for name in CORE} | BROUGHT.keys()
    early = {
        (path.relative_to(ROOT).as_posix(), top)
        for folder in ("bgen", "data_tools")
        for path, top, at_once in FILES[folder]
        if at_once and top not in core and path.relative_to(ROOT).as_posix() not in AT_ONCE
    }
    assert early == set()


def test_tests_import_what_the_extra_for_tests_brings() -> None:
    there = {package(name) for name in CORE | EXTRAS["test"]}
    early = {
        (path.relative_to(ROOT).as_posix(), top)
        for path, top, at_once in FILES["tests"]
        if at_once and top not in there
    }
    assert early == set()


def test_exceptions_are_none_too_many() -> None:
    everything = CORE.union(*EXTRAS.values())
    assert NOT_IMPORTED.keys() <= everything
    assert {package(name) for name in NOT_IMPORTED} & IMPORTED == {"mlflow"}, "which is mlflow-skinny's as well"
    assert IMPORTED_AS.keys() <= everything


def test_names_of_packages_are_those_of_the_installed_distributions() -> None:
    installed: dict[str, set[str]] = {}
    for top, distributions in packages_distributions().items():
        for distribution in distributions:
            installed.setdefault(normal(distribution), set()).add(top)
    wrong = {name for name in CORE if name in installed and package(name) not in installed[name]}
    assert wrong == set()
    assert len(CORE & installed.keys()) > 20, "otherwise nothing was compared"


def test_one_package_has_one_bound() -> None:
    bounds: dict[str, set[str]] = {}
    for requirement in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        found = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(.*)", requirement)
        assert found is not None, requirement
        bounds.setdefault(normal(found[1]), set()).add(found[2])
    assert {name for name, found in bounds.items() if len(found) > 1} == set()


def test_what_users_are_told_to_install_is_there() -> None:
    folders = [ROOT / name for name in ("bgen", "configs", "data_tools", "launch")]
    pages = [path for folder in folders for kind in ("*.py", "*.md") for path in folder.rglob(kind)]
    pages += ROOT.glob("*.md")
    told = {
        (match[1], extra)
        for path in pages
        for match in re.finditer(r"(bgen[\w-]*|'\.)\[([a-z,]+)\]", path.read_text(encoding="utf-8"))
        for extra in match[2].split(",")
    }
    extras = PROJECT["optional-dependencies"].keys()
    assert {name for name, _ in told} == {PROJECT["name"], "'."}
    assert {extra for _, extra in told} <= extras
