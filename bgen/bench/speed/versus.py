"""``bgen bench train --versus scvi``: bgen's training of a VAE beside scvi-tools', at the same architecture.

One hidden layer of 128 in encoder and decoder, 10 latent dimensions, negative binomial with an inverse dispersion per
gene, library size observed; the same cells for training and the same for judging, the same number of epochs, the same
KL warm-up, no thinning of counts, which only bgen has. The rest are each side's defaults: LayerNorm and a cosine
schedule for bgen, BatchNorm, dropout and a constant rate for scvi-tools; but that bgen takes torch's fused AdamW, and
no ZeRO where there is one rank. Each takes as many threads as it does by itself, bgen in one process and in a process
per core, in float32 and in bf16. They run in turn (:mod:`bgen.bench.speed.versus_worker`); on request, beside processes
that each keep a core busy.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from rich.console import Console
from rich.table import Table

import bgen
from bgen.bench.loaders.loaders import machine
from bgen.bench.speed import versus_worker
from bgen.bench.speed.busy import keeping_busy
from bgen.bench.speed.versus_worker import Job
from bgen.cpus import cpus, without_ours
from bgen.errors import UserError, nearest
from bgen.evaluate.metrics.counts import variable_genes
from bgen.progress import Say
from bgen.store.format.manifest import Source
from bgen.tasks.user_cells import read_input
from bgen.version import __version__
from data_tools.building.write import Contents, write_store
from data_tools.simulate.simulate import simulate

HIDDEN, LATENT, LEARNING_RATE = 128, 10, 1e-3
PACKAGES = {"scvi": "scvi-tools"}
TEST_SHARE = 0.2
KL_SHARE = 0.25
"""Share of the epochs in which the KL weight rises."""

MEASURED = ("cells_per_s", "seconds", "nll", "kl", "bound")


@dataclass(frozen=True)
class Variant:
    """A row of the table: whose training, in which precision, in how many processes."""

    side: str
    precision: str
    ranks: int

    @property
    def label(self) -> str:
        """For people."""
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.side}{ranks}{', bf16' if self.precision == 'bf16' else ''}"


def versus(
    peer: str,
    out: Path,
    *,
    data: Path | None = None,
    python: Path | None = None,
    batches: Sequence[int] = (128, 1024),
    epochs: int = 100,
    genes: int = 2000,
    threads: int | None = None,
    busy: int = 0,
    repetitions: int = 1,
    seed: int = 0,
    say: Say = print,
) -> dict[str, Any]:
    """Train both, print a table, and write ``versus.json`` into ``out``.

    Parameters
    ----------
    peer
        "scvi".
    out
        Folder for the result.
    data
        .h5ad of counts; None: simulated cells.
    python
        Python that has the peer; default: this one.
    batches
        Cells per step.
    epochs
        Passes over the training cells.
    genes
        The most variable genes that are kept.
    threads
        Threads of torch; default: as many as each side takes by itself.
    busy
        Processes that each keep a core busy meanwhile.
    repetitions
        Trainings of each side, in turn; medians are reported.

    Returns
    -------
    dict
        What was written.

    Raises
    ------
    UserError
        If the peer is unknown or not installed, the data is too small, or a training fails.
    """
    if peer not in PACKAGES:
        raise UserError(f"--versus {peer}: bgen is compared with {', '.join(PACKAGES)}.{nearest(peer, PACKAGES)}")
    pythons = {"bgen": Path(sys.executable), peer: python or Path(sys.executable)}
    require_peer(peer, pythons[peer])
    if epochs < 2:
        raise UserError("--epochs: at least 2, because the first one is not timed.")
    ranks = threads or cpus()
    variants = [Variant(peer, "float32", 1), Variant("bgen", "float32", 1), Variant("bgen", "bf16", 1)]
    if ranks > 1:
        variants += [Variant("bgen", precision, ranks) for precision in ("float32", "bf16")]
    rows = []
    with tempfile.TemporaryDirectory(prefix="bgen-versus-") as folder:
        facts = prepare(Path(folder), data, genes, max(batches), seed)
        say(f"{facts['train']:,} cells for training, {facts['test']:,} held out, {facts['genes']:,} genes")
        for batch in batches:
            found: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in variants}
            for repetition in range(repetitions):
                for number, variant in enumerate(variants):
                    say(f"batch {batch}, {variant.label}, {epochs} epochs ({repetition + 1} of {repetitions})")
                    job = Job(
                        side=variant.side,
                        folder=folder,
                        out=str(Path(folder) / f"{number}_{batch}_{repetition}"),
                        batch=batch,
                        epochs=epochs,
                        kl_epochs=max(1, round(KL_SHARE * epochs)),
                        hidden=HIDDEN,
                        latent=LATENT,
                        learning_rate=LEARNING_RATE,
                        precision=variant.precision,
                        ranks=variant.ranks,
                        threads=threads and threads // variant.ranks,
                        seed=seed + repetition,
                    )
                    with keeping_busy(busy):
                        found[variant].append(_run(job, pythons[variant.side]))
            rows += [_summarise(variant, batch, results) for variant, results in found.items()]
    for row in rows:
        base = next(other for other in rows if other["side"] == peer and other["batch"] == row["batch"])
        row["times"] = row["cells_per_s"] / base["cells_per_s"]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": threads,
        "busy": busy,
        "data": facts,
        "epochs": epochs,
        "repetitions": repetitions,
        "architecture": {"hidden": HIDDEN, "layers": 1, "latent": LATENT, "likelihood": "nb"},
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "versus.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _show(result)
    say(f"Written: {out / 'versus.json'}")
    return result


def prepare(folder: Path, data: Path | None, genes: int, batch: int, seed: int) -> dict[str, Any]:
    """Write the same cells and genes as a store and as scipy matrices; returns what they are.

    Raises
    ------
    UserError
        If the data cannot be used.
    """
    adata = simulate("demo", seed=seed) if data is None else read_input(data)
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    if counts.nnz == 0 or counts.data.min() < 0 or not np.array_equal(counts.data, np.rint(counts.data)):
        raise UserError(f"{data}: X does not hold counts. `bgen data check {data}` says more.")
    test = np.zeros(counts.shape[0], bool)
    test[np.random.default_rng(seed).permutation(len(test))[: round(TEST_SHARE * len(test))]] = True
    kept = variable_genes(counts[~test], min(genes, counts.shape[1]))
    counts = counts[:, kept].tocsr()
    some = np.asarray(counts.sum(axis=1)).ravel() > 0
    counts, test = counts[some], test[some]
    if (~test).sum() < 2 * batch:
        raise UserError(f"{(~test).sum()} training cells are too few for batches of {batch}: at least {2 * batch}.")
    sp.save_npz(folder / "train.npz", counts[~test], compressed=False)
    sp.save_npz(folder / "test.npz", counts[test], compressed=False)
    name = "simulated cells" if data is None else data.name
    ids = adata.var_names[kept].astype(str)
    cells = len(test)
    contents = Contents(
        counts=counts,
        genes=pd.DataFrame({"id": ids, "symbol": ids}),
        obs=pd.DataFrame(index=adata.obs_names[some].astype(str)),
        split=test.astype(np.uint8),
        splits=["train", "test"],
        source=np.zeros(cells, np.int32),
        row=np.arange(cells),
        sources=[Source(name=name, bytes=0, cells=cells, kept=cells, matrix="X")],
        organism="unknown",
        roles={},
    )
    write_store(folder / "store", contents, profile="fast", seed=seed, created_by=f"bgen {__version__}")
    return {
        "name": name,
        "train": int((~test).sum()),
        "test": int(test.sum()),
        "genes": len(kept),
        "nonzeros_per_cell": round(counts.nnz / cells, 1),
    }


def require_peer(peer: str, python: Path) -> None:
    """Raise a UserError unless the Python has the peer."""
    look = f"import importlib.metadata as m; m.version('{PACKAGES[peer]}')"
    try:
        done = subprocess.run([str(python), "-c", look], capture_output=True, check=False).returncode
    except OSError as error:
        raise UserError(f"--python {python}: {error.strerror}.") from None
    if done != 0:
        raise UserError(f"{python} does not have {PACKAGES[peer]}: install it there, or name another with --python.")


def peer_environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a process in a peer's Python: the user's, without this Python's packages."""
    rest = without_ours(os.environ)
    rest.pop("PYTHONPATH", None)
    return rest if threads is None else {**rest, "OMP_NUM_THREADS": str(threads)}


def _run(job: Job, python: Path) -> dict[str, Any]:
    environment = peer_environment(job.threads)
    if job.side == "bgen":  # which finds what bgen sets, also in the worker, where torch is loaded first
        here = str(Path(bgen.__file__).parents[1])
        paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, **environment, "PYTHONPATH": paths}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"] if job.ranks > 1 else []
    command = [str(python), *launcher, str(versus_worker.__file__), json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=job.folder)
    if done.returncode != 0:
        raise UserError(f"training with {job.side} failed:\n{done.stderr.strip()[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _summarise(variant: Variant, batch: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    medians = {name: statistics.median(result[name] for result in results) for name in MEASURED}
    versions = {name: results[0][name] for name in ("version", "torch", "python")}
    return {"label": variant.label, **asdict(variant), "batch": batch, **medians, **versions}


def _show(result: dict[str, Any]) -> None:
    data, computer = result["data"], result["machine"]
    threads = "as many threads as each takes" if result["threads"] is None else f"{result['threads']} threads"
    beside = f", beside {result['busy']} busy processes" if result["busy"] else ""
    table = Table(
        title=f"VAE, one hidden layer of {HIDDEN}, {LATENT} latent, NB: {data['train']:,} cells x {data['genes']:,} "
        f"genes of {data['name']}, {result['epochs']} epochs",
        caption=f"{computer['cpu']}, {computer['cores']} cores{beside}, {threads}; held-out nats a "
        "cell: -log p(x|z), and the bound of -log p(x)",
    )
    for name in ("batch", "library", "version", "cells/s", "times", "-log p(x|z)", "bound"):
        table.add_column(name, justify="left" if name in ("library", "version") else "right")
    for row in result["rows"]:
        table.add_row(
            str(row["batch"]),
            row["label"],
            row["version"],
            f"{row['cells_per_s']:,.0f}",
            f"{row['times']:.2f}",
            f"{row['nll']:,.1f}",
            f"{row['bound']:,.1f}",
        )
    Console(width=120).print(table)
