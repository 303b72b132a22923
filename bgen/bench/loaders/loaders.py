"""``bgen bench loader``: bgen beside every other loader of single-cell counts that is installed, on one atlas.

Each loader reads the synthetic atlas (:mod:`bgen.bench.loaders.atlas`) in its own format and its best setting, in a
process and, if need be, a Python of its own (:mod:`bgen.bench.loaders.worker`). The repetitions are interleaved and
medians reported, because a machine's speed changes within minutes: ratios of one run mean more than rates.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bgen
from bgen.bench.loaders import worker
from bgen.bench.loaders.atlas import Atlas
from bgen.bench.loaders.remote import bench_remote
from bgen.bench.loaders.report import draw, show
from bgen.cpus import cpus
from bgen.errors import UserError, nearest
from bgen.progress import Say
from data_tools.building.build import build
from data_tools.building.write import write_store
from data_tools.check.check import CheckOptions, check

PROFILES = ("small", "fast")
H5AD = "atlas.h5ad"
WRITTEN = "written.json"
CREATED_BY = "bgen bench loader"
SYNTHETIC = CheckOptions(organism="synthetic", accept_unnamed_genes=True)
PACKAGES = {
    "annbatch": ("annbatch", "zarrs", "torch"),
    "cellstream": ("cellstream",),
    "scdl": ("bionemo-scdl", "torch"),
    "scdataset": ("scdataset", "torch"),
    "webdataset": ("webdataset", "zstandard"),
}
"""The other loaders, and what their environment must hold."""


TRAJECTORIES = "trajectories"
"""The form of bgen's loader of populations, whose CPU time for a cell is compared with that of its CSR batches."""


@dataclass(frozen=True)
class Case:
    """One row of the table: ``path`` is a name in the atlas folder, the rest as in
    :class:`bgen.bench.loaders.worker.Job`.
    """

    loader: str
    path: str
    batch: int
    form: str
    threads: int = 1


def cases(peers: Sequence[str], batches: Sequence[int], threads: int) -> list[Case]:
    """Return what is measured; the forms that cost most only at the first batch size."""
    found = []
    for batch in batches:
        first = batch == batches[0]
        for profile in PROFILES:
            found += [Case("bgen", profile, batch, "packed"), Case("bgen", profile, batch, "packed", threads)]
            found += [Case("bgen", profile, batch, form) for form in ("csr", "dense", TRAJECTORIES) if first]
        if "annbatch" in peers:
            found += [Case("annbatch", "annbatch", batch, form) for form in ("csr", "dense") if first or form == "csr"]
        if "cellstream" in peers:
            found += [Case("cellstream", "cellstream", batch, "csr", n) for n in (1, threads)]
            found += [Case("cellstream", "cellstream", batch, "dense")] if first else []
        if first:
            found += [
                Case(peer, _file(peer), batch, "csr") for peer in ("scdl", "scdataset", "webdataset") if peer in peers
            ]
    return list(dict.fromkeys(found))


def bench_loader(
    out: Path,
    *,
    cells: int = 400_000,
    atlas_folder: Path | None = None,
    peers: Sequence[str] | None = None,
    pythons: Mapping[str, Path] | None = None,
    batches: Sequence[int] = (1024, 4096),
    seconds: float = 4.0,
    repetitions: int = 3,
    threads: int = 2,
    say: Say = print,
) -> dict[str, Any]:
    """Measure loaders, print a table, and write ``loader.json`` and ``loader.png`` into ``out``.

    Parameters
    ----------
    cells
        Cells of the atlas; it takes 40 kB a cell of disk with all peers.
    atlas_folder
        Where the atlas is kept from one run to the next; default: the user's cache folder.
    peers
        Loaders to measure beside bgen; default: those that are installed.
    pythons
        Peer to the Python that has it ("*": all the others); default: this one. annbatch needs 3.12.
    batches
        Cells per batch; the first is that of the CSR and dense forms.
    seconds
        How long each measurement takes, after a warm-up of a quarter of it.
    repetitions
        Measurements of each case, interleaved.
    threads
        Threads of the cases with several.

    Returns
    -------
    dict
        What was written to ``loader.json``.

    Raises
    ------
    UserError
        If a peer that was asked for is unknown or not installed, or a loader fails.
    """
    where = {name: Path((pythons or {}).get(name, (pythons or {}).get("*", sys.executable))) for name in PACKAGES}
    found = _installed(peers, where)
    where["bgen"] = Path(sys.executable)
    atlas = Atlas(cells=cells)
    folder = prepare(_root(atlas_folder), atlas, found, where, say)
    work = cases(list(found), batches, threads)
    records: dict[Case, list[dict[str, Any]]] = {case: [] for case in work}
    for repetition in range(repetitions):
        for number, case in enumerate(work, 1):
            say(f"repetition {repetition + 1} of {repetitions}, {number} of {len(work)}: {_label(case)}")
            records[case].append(_run(case, folder, where, seconds, types=False))
    rows = [_summarise(case, records[case], folder, cells) for case in work]
    for row in rows:
        case = Case(row["loader"], row["path"], row["batch"], row["form"], row["threads"])
        if case.threads == 1 and case.form != "dense":
            say(f"types per batch: {_label(case)}")
            row["types"] = _run(case, folder, where, 0.5, types=True)["types"]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "atlas": {**asdict(atlas), "nonzeros_per_cell": _nonzeros(folder)},
        "random_types": {str(batch): _random_types(atlas, batch) for batch in batches},
        "seconds": seconds,
        "repetitions": repetitions,
        "rows": _with_ratios(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "loader.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, out / "loader.png")
    show(result)
    say(f"Written: {out / 'loader.json'}, {out / 'loader.png'}")
    return result


def bench_late(
    out: Path,
    latencies: Sequence[int],
    *,
    cells: int,
    atlas_folder: Path | None = None,
    requests: int,
    seconds: float,
    repetitions: int,
    say: Say = print,
) -> list[dict[str, Any]]:
    """Measure the atlas at a server that answers late (:func:`bgen.bench.loaders.remote.bench_remote`)."""
    folder = prepare(_root(atlas_folder), Atlas(cells=cells), {}, {}, say)
    how: dict[str, Any] = {"requests": requests, "seconds": seconds, "repetitions": repetitions, "say": say}
    return bench_remote(out, folder / PROFILES[0], latencies, **how)


def _root(atlas_folder: Path | None) -> Path:
    return atlas_folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bgen" / "bench"


def prepare(root: Path, atlas: Atlas, peers: Mapping[str, str], pythons: Mapping[str, Path], say: Say) -> Path:
    """Write the atlas in every format that is not there yet; return its folder."""
    folder = root / f"atlas-{atlas.cells}-{atlas.genes}-{atlas.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "types.npy", atlas.cell_type)
    h5ad = folder / H5AD
    if peers and not h5ad.exists():
        say("Writing the atlas as h5ad")
        atlas.write_h5ad(h5ad)
    written = _written(folder)
    for name in [*PROFILES, *(peer for peer in peers if _file(peer) == peer)]:
        if (folder / name).exists():
            continue
        say(f"Writing the atlas of {atlas.cells:,} cells for {f'bgen {name}' if name in PROFILES else name}")
        began = time.perf_counter()
        if name in PROFILES and not peers:
            write_store(folder / name, atlas.contents(), profile=name, seed=0, created_by=CREATED_BY)
        elif name in PROFILES:
            build(check([h5ad], SYNTHETIC), folder / name, profile=name, created_by=CREATED_BY, workers=2)
        else:
            partial = folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _call(pythons[name], {"convert": name, "h5ad": str(h5ad), "out": str(partial)}, f"writing for {name}")
            partial.rename(folder / name)
        if peers:
            written[name] = round(time.perf_counter() - began, 1)
            (folder / WRITTEN).write_text(json.dumps(written), encoding="utf-8")
    return folder


def _written(folder: Path) -> dict[str, float]:
    """Return how many seconds each format took to be written from the h5ad, bgen's with its check."""
    path = folder / WRITTEN
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _file(peer: str) -> str:
    return H5AD if peer == "scdataset" else peer  # scDataset reads the h5ad itself


def _installed(peers: Sequence[str] | None, pythons: Mapping[str, Path]) -> dict[str, str]:
    """Return the peers to measure with their versions."""
    for peer in peers or ():
        if peer not in PACKAGES:
            raise UserError(f"There is no loader '{peer}'.{nearest(peer, list(PACKAGES))}")
    found = {}
    for peer, packages in PACKAGES.items():
        if peers is not None and peer not in peers:
            continue
        look = f"import importlib.metadata as m; print([m.version(p) for p in {packages}][0])"
        done = subprocess.run([str(pythons[peer]), "-c", look], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[peer] = done.stdout.strip()
        elif peers is not None:
            raise UserError(
                f"{pythons[peer]} does not have {peer}: install {' '.join(packages)} there, or name another Python."
            )
    return found


def _call(python: Path, task: dict[str, Any], what: str) -> str:
    here = str(Path(bgen.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": paths} if "bgen" in what else {})}
    command = [str(python), str(worker.__file__), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise UserError(f"{what} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def _run(case: Case, folder: Path, pythons: Mapping[str, Path], seconds: float, *, types: bool) -> dict[str, Any]:
    task = asdict(case) | {
        "path": str(folder / case.path),
        "seconds": seconds,
        "types": str(folder / "types.npy") if types else None,
    }
    result: dict[str, Any] = json.loads(_call(pythons[case.loader], task, f"measuring {_label(case)}").splitlines()[-1])
    return result


def _summarise(case: Case, records: list[dict[str, Any]], folder: Path, cells: int) -> dict[str, Any]:
    """Return a row: medians of the rates, times and memory."""
    path = folder / case.path
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    numbers = ("wall_rate", "cpu_rate", "first_batch_s", "private_mb")
    return {
        **asdict(case),
        **{name: statistics.median(record[name] for record in records) for name in numbers},
        "best_wall_rate": max(record["wall_rate"] for record in records),
        "bytes_per_cell": sum(file.stat().st_size for file in files) / cells,
        "write_s": _written(folder).get(case.path),
        "version": records[0]["version"],
        "python": records[0]["python"],
    }


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each row's rates relative to annbatch's and cellstream's of the same batch size and, if dense, form.

    Of trajectories: the CPU time of a cell over that of the CSR batches of the same store and size.
    """
    for row in rows:
        if row["form"] == TRAJECTORIES:
            same = [
                base["cpu_rate"]
                for base in rows
                if base["form"] == "csr" and all(base[key] == row[key] for key in ("path", "batch", "threads"))
            ]
            row["cpu_per_cell_over_csr"] = same[0] / row["cpu_rate"]
            continue
        for peer in ("annbatch", "cellstream"):
            for base in rows:
                same_form = (base["form"] == "dense") == (row["form"] == "dense")
                if base["loader"] == peer and base["batch"] == row["batch"] and same_form and base["threads"] == 1:
                    row[f"cpu_over_{peer}"] = row["cpu_rate"] / base["cpu_rate"]
                    row[f"wall_over_{peer}"] = row["wall_rate"] / base["wall_rate"]
    return rows


def _random_types(atlas: Atlas, batch: int, draws: int = 300) -> float:
    rng = np.random.default_rng(0)
    size = min(batch, atlas.cells)
    some = [atlas.cell_type[rng.choice(atlas.cells, size, replace=False)] for _ in range(draws)]
    return float(np.mean([len(np.unique(types)) for types in some]))


def _nonzeros(folder: Path) -> float:
    manifest = json.loads((folder / PROFILES[0] / "manifest.json").read_text(encoding="utf-8"))
    return float(manifest["n_nonzeros"] / manifest["n_cells"])


def machine() -> dict[str, Any]:
    """Return what is measured on: processor, cores, memory, system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": cpus(), "memory_gib": round(memory, 1), "system": platform.platform()}


def _label(case: Case) -> str:
    what = f"{case.loader} {case.path}" if case.loader == "bgen" else case.loader
    return f"{what}, {case.form}, batches of {case.batch}, {case.threads} thread{'s' if case.threads > 1 else ''}"
