"""What many tests share: real data if it is there, one small trained model, private caches."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# Processes that share the cores share their threads; what they start does so too. Before torch, which reads it once.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share //= int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import typer.main

from bgen.store.format.manifest import Source
from bgen.store.store import Store
from data_tools.building.splits import DEFAULT, assign
from data_tools.building.write import Contents, write_store

ROOT = Path(__file__).resolve().parent.parent
# Commands run in this process by the hundred: what typer makes of their functions is made once.
typer.main.get_command = functools.cache(typer.main.get_command)
sys.path[:0] = [str(ROOT / "tests/starting"), str(ROOT / "tests")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that leave the process group first: DeepSpeed remembers its groups, and does not survive it."""
    items.sort(key=lambda item: "distributed" not in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def private_extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what torch would compile apart from every other program's, so that no stale lock can hang a test."""
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))
    yield
    if before is None:
        del os.environ["TORCH_EXTENSIONS_DIR"]
    else:
        os.environ["TORCH_EXTENSIONS_DIR"] = before


@pytest.fixture(scope="session", autouse=True)
def no_hurry() -> Iterator[None]:
    """On a busy machine MLflow's process may need minutes for what takes seconds; it is not kept from its work here."""
    from bgen.track import mirror

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "CLOSE_SQLITE", 900.0)
        patch.setattr(mirror, "NICENESS", 0)
        yield


@pytest.fixture
def few_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow that fits its levels generates few latents for that: for tests about something else."""
    monkeypatch.setattr("bgen.train.stages.levels.COMPARED_LATENTS", 256)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets; skips where it is not there."""
    folder = Path(os.environ.get("BGEN_REAL_DATA", ROOT / "../shared/data"))
    if not folder.is_dir():
        pytest.skip("no real data: set BGEN_REAL_DATA to the folder that holds it")
    return folder


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def run_bgen(*arguments: object) -> Result:
    """Run the command line in this process, as a shell would see it."""
    import contextlib
    import io

    from bgen.cli import main as cli

    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = ["bgen", *map(str, arguments)]
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.argv = argv
        if (world := sys.modules.get("bgen.distributed.world")) is not None:
            world._on_cpu = False  # what `--device cpu` says of a whole process
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def bgen() -> Run:
    """Run a command line: ``bgen("data", "check", path)``."""
    return run_bgen


@dataclass
class Demo:
    """Folders of one small pass through everything."""

    folder: Path
    cells: Path
    store: Path
    vae: Path
    flow: Path
    model: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Simulate, build, train both stages for a few steps and export, all through the command line."""
    folder = tmp_path_factory.mktemp("demo")
    made = Demo(*(folder, *(folder / name for name in ("cells.h5ad", "store", "vae", "flow", "model"))))
    train = ["train.steps=60", "train.global_batch=128", "train.eval_every=30", "track.mlflow=false"]
    common = [*train, f"data.store={made.store}", "track.progress=false"]
    for arguments in (
        ["data", "simulate", "--preset", "tiny", "--out", made.cells],
        ["data", "build", made.cells, "--out", made.store, "--splits", "train=0.6,valid=0.2,test=0.2"],
        ["train", "demo/vae", f"out={made.vae}", *common],
        ["train", "demo/flow", f"out={made.flow}", f"flow.vae={made.vae}", *common],
        ["export", made.flow, "--out", made.model],
    ):
        result = run_bgen(*arguments)
        assert result.code == 0, result
    return made


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite file of MLflow, migrated and empty: to copy, because making one takes long on a busy machine."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what MLflow calls of SQLAlchemy
        MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def course(demo: Demo) -> Path:
    """Train a small hybrid on the demo's trajectories over time; return its model directory."""
    out = demo.folder / "course"
    result = run_bgen(
        *["train", "trajectories", f"out={out}", f"data.store={demo.store}", f"flow.vae={demo.vae}"],
        "data.trajectories={system: [donor], times: 3, cells: 16}",
        "flow.backbone={name: hybrid, width: 32, layers: 1, time: {scale: 24.0, tokens: 2}, mamba2: {head_width: 16}}",
        *["train.steps=40", "train.global_batch=192", "train.learning_rate=3.0e-3", "train.eval_every=0"],
        *["train.ema=0", "track.mlflow=false", "track.progress=false"],
    )
    assert result.code == 0, result
    return out / "model"


def make_contents(n_cells: int = 1500, n_genes: int = 900, seed: int = 0) -> Contents:
    """Random counts with what the codec must get right: long gaps, counts of 255 and more, an empty last gene."""
    rng = np.random.default_rng(seed)
    counts = sp.random(n_cells, n_genes, density=0.04, format="csr", rng=rng, dtype=np.float64)
    counts.data = np.ceil(rng.lognormal(1.0, 1.5, counts.nnz))
    counts.data[rng.integers(0, counts.nnz, 300)] = rng.integers(250, 70_000, 300)
    counts = sp.csr_matrix(counts)
    counts = sp.hstack([counts[:, :-1], sp.csr_matrix((n_cells, 1))], format="csr")  # a gene that no cell expresses
    obs = pd.DataFrame(
        {
            "celltype": rng.choice(["B", "T", "NK"], n_cells),
            "hours": rng.choice([0.0, 6.0, 12.5], n_cells),
            "a/b c": rng.choice([True, False], n_cells),
            "dose": np.where(rng.random(n_cells) < 0.1, np.nan, 0.1),
            "barcode": [f"cell{i}" for i in range(n_cells)],
        },
        index=[f"AAC-{i}é" for i in range(n_cells)],
    )
    return Contents(
        counts=counts,
        genes=pd.DataFrame(
            {"id": [f"ENSG{i:05d}" for i in range(n_genes)], "symbol": [f"S{i}" for i in range(n_genes)]}
        ),
        obs=obs,
        split=assign(DEFAULT, None, n_cells, seed),
        splits=list(DEFAULT),
        source=np.zeros(n_cells, np.int32),
        row=np.arange(n_cells),
        sources=[Source(name="x.h5ad", bytes=1, cells=n_cells, kept=n_cells, matrix="X")],
        organism="synthetic",
        roles={"cell_type": "celltype", "time": "hours", "population": "celltype"},
    )


@pytest.fixture(scope="session")
def contents() -> Contents:
    return make_contents()


@pytest.fixture(scope="session", params=["small", "fast"])
def store(request: pytest.FixtureRequest, contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("stores") / request.param
    write_store(folder, contents, profile=request.param, seed=0, created_by="test")
    return Store(folder)


@dataclass
class Adding:
    """Adds a component to bgen from outside, and notes which files of bgen it would touch if it came with bgen.

    The component's own file is one of them; a registry's line, and the settings beside it, are in the registry's file.
    """

    patch: pytest.MonkeyPatch
    own_file: str
    files: set[str]

    def line(self, module: ModuleType, registry: str, name: str, value: object) -> None:
        """Add one line to the dictionary ``registry`` of a module."""
        assert module.__file__ is not None
        assert name not in getattr(module, registry), f"bgen has a '{name}' already"
        self.patch.setitem(getattr(module, registry), name, value)
        self.files.add(module.__file__)

    @property
    def touched(self) -> int:
        """How many files it would touch."""
        return len({self.own_file, *self.files})


@pytest.fixture(scope="module")
def adding(request: pytest.FixtureRequest) -> Iterator[Adding]:
    """Let a test module stand for the file of a new component."""
    with pytest.MonkeyPatch.context() as patch:
        yield Adding(patch, str(request.path), set())
