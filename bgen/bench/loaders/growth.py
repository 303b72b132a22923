"""``bgen bench growth``: how much memory each process takes for each cell, from a file of cells to an export.

Cells are cheap: :data:`EXPRESSED` counts of :data:`GENES` genes each, barcodes of 28 characters, four columns of obs.
So what is measured is what a process holds of every cell, whatever its counts. Every step runs in a process of its own,
once for each number of cells, and once before for few cells, so that nothing is compiled in a process that is measured.

Memory is what the process takes beyond what it had when everything was imported (:mod:`bgen.bench.loaders.memory`).
Bytes a cell are the slope between two numbers of cells.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.bench.loaders.memory import measure
from bgen.config.data import TrajectoriesConfig
from bgen.data.as_anndata import read_split
from bgen.data.loader import CountReader, TrainLoader
from bgen.data.trajectory_loader import TrajectoryLoader, read_trajectories
from bgen.errors import UserError
from bgen.files import write_result
from bgen.order.keys import hash_keys
from bgen.order.pools import PooledTrajectories
from bgen.store.leakage import assert_no_leakage
from bgen.store.open import open_store
from bgen.store.store import Store
from bgen.store.weighting import weighted_order
from data_tools.building.build import build
from data_tools.check.check import CheckOptions, check
from data_tools.check.findings import Roles
from data_tools.export.to_anndata import to_anndata
from data_tools.export.to_webdataset import to_webdataset

GENES, EXPRESSED = 500, 8
FEW = 100_000
"""Cells of the run that is not counted; more than one file of numbers per cell has."""

AT_ONCE = 1 << 18
SAMPLED = 20_000
"""Cells that an evaluation looks at."""

COLUMNS = ["donor", "perturbation", "time"]
SHAPE: dict[str, Any] = {"batch": 1024, "lanes": 8, "window": 16, "seed": 0}


def write_cells(path: Path, n: int) -> None:
    """Write an .h5ad of ``n`` cells, a part at a time."""
    cells = np.arange(n)

    def draw(what: int, among: int) -> NDArray[np.int16]:
        return (hash_keys(what, cells) % np.uint64(among)).astype(np.int16)

    def labels(what: int, names: list[str]) -> Any:
        return pd.Categorical.from_codes(draw(what, len(names)), pd.Index(names))

    obs = pd.DataFrame(
        {
            "donor": labels(0, [f"donor {i:02d}" for i in range(12)]),
            "perturbation": labels(1, ["control", *(f"drug {i}" for i in range(399))]),
            "cell_type": labels(2, [f"type {i}" for i in range(40)]),
            "time": 6.0 * draw(3, 5),
        },
        index=pd.Index([f"AAACCCAAGAAACACT-{i:011d}" for i in range(n)]),
    )
    anndata.AnnData(obs=obs, var=pd.DataFrame(index=[f"GENE{i:05d}" for i in range(GENES)])).write_h5ad(path)
    with h5py.File(path, "a") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n, GENES)})
        group.create_dataset("indptr", data=np.arange(n + 1, dtype=np.int64) * EXPRESSED)
        arrays = [
            group.create_dataset(name, (n * EXPRESSED,), kind, chunks=(min(1 << 20, n * EXPRESSED),))
            for name, kind in (("data", np.float32), ("indices", np.int32))
        ]
        for start in range(0, n, AT_ONCE):
            some = np.arange(start, min(start + AT_ONCE, n))[:, None]
            keys = hash_keys(4, some, np.arange(EXPRESSED))
            part = slice(start * EXPRESSED, (start + len(some)) * EXPRESSED)
            width = GENES // EXPRESSED  # one gene of each of so many, so that none comes twice
            genes = width * np.arange(EXPRESSED) + (keys % np.uint64(width)).astype(np.int64)
            arrays[0][part] = (1 + (keys >> np.uint64(40)) % np.uint64(9)).astype(np.float32).reshape(-1)
            arrays[1][part] = genes.astype(np.int32).reshape(-1)


def _check(folder: Path) -> object:
    roles = Roles(donor="donor", perturbation="perturbation", control="control", time="time", time_unit="hours")
    report = check([folder / "cells.h5ad"], CheckOptions(organism="synthetic", roles=roles))
    if report.errors:
        raise UserError(f"The cells of this benchmark cannot be used: {report.errors[0].message}")
    return report


def _build(folder: Path) -> object:
    shutil.rmtree(folder / "store", ignore_errors=True)
    report = _check(folder)
    return report, build(report, folder / "store", created_by="bgen bench growth", workers=0)  # type: ignore[arg-type]


def _train(folder: Path) -> object:
    store = open_store(folder / "store")
    loader = TrainLoader(CountReader(store, COLUMNS), store.order("train", **SHAPE), seed=0)
    return loader, [loader.read(step) for step in range(3)]


def _weigh(folder: Path) -> object:
    store = open_store(folder / "store")
    order = weighted_order(store, "train", temperature=3.0, by="perturbation", **SHAPE)
    loader = TrainLoader(CountReader(store, COLUMNS), order, seed=0)
    return loader, loader.read(0)


def _follow(along: str) -> Callable[[Path], object]:
    def work(folder: Path) -> object:
        store = open_store(folder / "store")
        shape = TrajectoriesConfig.model_validate({"along": along, "system": ["donor"], "times": 2, "cells": 32})
        found = read_trajectories(store, "train", shape)
        about: dict[str, Any] = {"batch": 16, "times": shape.times, "cells": shape.cells, "seed": 0, "name": along}
        order = PooledTrajectories(found, **about, lanes=8, pool=shape.pool, first_cell=store.first_cell)
        loader = TrajectoryLoader(CountReader(store, COLUMNS), order, seed=0, micro_batch=16)
        return loader, loader.read(0)

    return work


def _look_for_leaks(folder: Path) -> object:
    store = open_store(folder / "store")
    assert_no_leakage(store)
    return store


def _evaluate(folder: Path) -> object:
    store = open_store(folder / "store")
    return [read_split(store, split, SAMPLED, 0) for split in ("train", "test")]


def _to_anndata(folder: Path) -> object:
    (folder / "again.h5ad").unlink(missing_ok=True)
    done = to_anndata(Store(folder / "store"), folder / "again.h5ad")
    (folder / "again.h5ad").unlink()
    return done


def _to_webdataset(folder: Path) -> object:
    done = to_webdataset(Store(folder / "store"), folder / "tar")
    shutil.rmtree(folder / "tar")
    return done


STEPS: dict[str, Callable[[Path], object]] = {
    "check": _check,
    "build": _build,
    "rank, cells": _train,
    "rank, weighted": _weigh,
    "rank, over time": _follow("time"),
    "rank, perturbations": _follow("perturbation"),
    "rank 0, looking for leaks": _look_for_leaks,
    "evaluation": _evaluate,
    "export, .h5ad": _to_anndata,
    "export, WebDataset": _to_webdataset,
}
"""Step to what it does in a folder that holds ``cells.h5ad``, and from the build on ``store``."""


def bench_growth(
    out: Path, *, cells: Sequence[int], steps: Sequence[str] = (), say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Measure every step for several numbers of cells, print a table, and write ``growth.json`` into ``out``.

    Parameters
    ----------
    cells
        Numbers of cells, two or more.
    steps
        Only these, beside the build that they need; default: all.

    Raises
    ------
    UserError
        If there are too few numbers of cells, or a step fails.
    """
    sizes = sorted(set(cells))
    if len(sizes) < 2:
        raise UserError("Growth is what lies between two numbers of cells: give --cells twice or more.")
    if unknown := [step for step in steps if step not in STEPS]:
        raise UserError(f"There is no step '{unknown[0]}': there are {', '.join(STEPS)}.")
    chosen = [step for step in STEPS if step == "build" or not steps or step in steps]
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, dict[str, float]]] = {step: {} for step in chosen}
    for n in (FEW, *sizes):
        with tempfile.TemporaryDirectory(prefix="bgen-growth-", dir=out) as folder:
            write_cells(Path(folder) / "cells.h5ad", n)
            for step, measured in zip(chosen, _measure_apart(chosen, Path(folder)), strict=True):
                if n in sizes:
                    found[step][n] = measured
                    say(f"{n:,} cells, {step}: {measured['own'] / 1e6:,.0f} MB, {measured['seconds']:.1f} CPU s")
    say(table(found, sizes))
    result = {"cells": sizes, "steps": {step: list(by.values()) for step, by in found.items()}}
    write_result(out / "growth.json", json.dumps(result, indent=1) + "\n")
    say(f"Written: {out / 'growth.json'}")
    return result


def table(found: dict[str, dict[int, dict[str, float]]], sizes: Sequence[int]) -> str:
    """Return what was measured as a Markdown table."""
    first, last = sizes[0], sizes[-1]
    heads = ["process", *(f"{n:,} cells" for n in sizes), "bytes a cell", "shared bytes a cell", "at 10^9 cells"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for step, by in found.items():
        own, shared = ((by[last][kind] - by[first][kind]) / (last - first) for kind in ("own", "shared"))
        far = (by[last]["own"] + own * (1e9 - last)) / 1e9
        each = " | ".join(f"{by[n]['own'] / 1e6:,.0f} MB" for n in sizes)
        lines.append(f"| {step} | {each} | {own:.1f} | {shared:.1f} | {far:,.1f} GB |")
    return "\n".join(lines)


def _measure_apart(steps: Sequence[str], folder: Path) -> Iterator[dict[str, float]]:
    """Measure steps, each in a process of its own, which another one starts that has imported everything.

    Raises
    ------
    UserError
        If one fails.
    """
    # memory that was given back is not kept, so that what is taken is what is in use
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}
    env["XDG_CACHE_HOME"] = str(folder / "cache")
    command = [sys.executable, "-m", "bgen.bench.loaders.growth", str(folder), *steps]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for step in steps:
            if not (line := process.stdout.readline()):
                raise UserError(f"The step '{step}' failed: what it said stands above.")
            yield json.loads(line)


def main(folder: Path, steps: Sequence[str]) -> None:
    """Measure steps, each in a child of this process, and write a line of JSON of each."""
    for step in steps:
        child = os.fork()
        if child == 0:
            print(json.dumps(measure(STEPS[step], folder)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
