"""``bgen demo``: the whole job once, on simulated cells or on the user's, in one folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from bgen.config.load import load_config, stage_overrides
from bgen.config.run import Config
from bgen.errors import UserError
from bgen.files import require_new_folder, write_h5ad
from bgen.names import shown
from bgen.progress import Progress
from bgen.store.format.manifest import Manifest
from bgen.tasks.evaluate import score
from bgen.tasks.load import load_model
from bgen.train.run import train
from bgen.version import __version__
from data_tools.building.build import build
from data_tools.check.check import check
from data_tools.simulate.simulate import simulate

ASKED = ("cell_type", "perturbation", "time", "dose")
"""Roles that a flow is conditioned on where the data has them: the demo's, and in Python unless it is said."""

STEPS = 7


def run_demo(
    data: Path | None,
    out: Path,
    *,
    seed: int,
    overrides: Sequence[str],
    console: Console,
    progress: Callable[[], AbstractContextManager[Progress]],
) -> None:
    """Simulate (or take ``data``), check, build, train VAE and flow, generate, evaluate; all into ``out``.

    Parameters
    ----------
    data
        An .h5ad of counts; None: simulated cells.
    overrides
        ``vae.section.key=value`` and ``flow.section.key=value`` for the two training runs.

    Raises
    ------
    UserError
        If ``out`` is not empty, or the data cannot be used.
    """
    require_new_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    step = _Steps(console, begin)

    step("Simulate" if data is None else f"Take {data.name}")
    if data is None:
        adata = simulate("demo", seed=seed)
        data = out / "cells.h5ad"
        write_h5ad(adata, data)
        console.print(f"{adata.n_obs:,} cells x {adata.n_vars:,} genes, with the truth behind them: {data}")

    step("Check")
    report = check([data])
    report.print(console)
    if report.errors:
        with contextlib.suppress(OSError):
            out.rmdir()  # nothing of the user's own data is in it yet
        raise UserError(f"{data} cannot be used yet: the table above says what to mend.")

    step("Build the store")
    with progress() as advance:
        manifest = build(
            report,
            out / "store",
            created_by=f"bgen {__version__}",
            splits={"train": 0.7, "valid": 0.1, "test": 0.2},
            seed=seed,
            progress=advance,
        )
    size = sum(file.bytes for file in manifest.files.values())
    console.print(f"{manifest.n_cells:,} cells, {size / manifest.n_cells:,.0f} bytes a cell: {out / 'store'}")

    step("Train the VAE")
    configs = _configs(out, manifest, seed, overrides)
    _train(configs["vae"], out)
    step("Train the flow")
    _train(configs["flow"], out)
    (out / "flow" / "model").rename(out / "model")

    step("Generate cells")
    model = load_model(out / "model")
    with progress() as advance:
        cells = model.generate(1000, seed=seed, progress=advance)
    write_h5ad(cells, out / "generated.h5ad")
    console.print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes as counts: {out / 'generated.h5ad'}")

    step("Evaluate")
    with progress() as advance:
        scores = score(model, out / "store", out / "report", seed=seed, progress=advance)
    console.print(scores.table())
    console.print(scores.headline(), highlight=False)
    console.print()
    console.print(f"model    {out / 'model'}          bgen.load('{out / 'model'}')", highlight=False)
    console.print(f"MLflow   {out / 'mlflow.db'}", highlight=False)
    console.print(f"report   {out / 'report' / 'report.html'}", highlight=False)
    took = f"{time.perf_counter() - begin:.0f} s in all, torch with {torch.get_num_threads()} threads"
    console.print(took, style="dim")


class Stopped(UserError):
    """A signal ended the demo (128 and the number of SIGTERM)."""

    exit_code = 143


def _train(config: Config, out: Path) -> None:
    """Train a stage to its end."""
    if train(config).interrupted:
        raise Stopped(
            f"The demo was stopped by a signal and is not complete; a demo cannot go on. Start it again with another "
            f"--out, or remove {out} first."
        )


class _Steps:
    """Prints a headline with the time so far."""

    def __init__(self, console: Console, begin: float) -> None:
        self.console, self.begin, self.number = console, begin, 0

    def __call__(self, name: str) -> None:
        self.number += 1
        elapsed = time.perf_counter() - self.begin
        place = (f"\n{self.number}/{STEPS}", "bold cyan")
        self.console.print(Text.assemble(place, " ", (shown(name), "bold"), " ", (f"{elapsed:.0f} s", "dim")))


def _configs(out: Path, manifest: Manifest, seed: int, overrides: Sequence[str]) -> dict[str, Config]:
    """Return the demo's two configurations for the columns that the data has."""
    batches = manifest.roles.get("batch")
    covariates = [batches] if batches and manifest.columns[batches].kind == "category" else []
    conditions = [manifest.roles[role] for role in ASKED if role in manifest.roles]
    given = stage_overrides(overrides)
    common: list[Any] = [f"seed={seed}", f"data.store={out / 'store'}", "track.experiment=bgen-demo"]
    vae = [*common, f"out={out / 'vae'}", f"vae.covariates={covariates}", *given["vae"]]
    flow = [*common, f"out={out / 'flow'}", f"flow.vae={out / 'vae'}", f"flow.conditions={conditions}", *given["flow"]]
    return {"vae": load_config("demo/vae", vae), "flow": load_config("demo/flow", flow)}
