"""The command line: verbs to functions, nothing else. Heavy imports stand inside the verbs, so ``--help`` is quick."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bgen import __version__
from bgen.cli.bench import app as bench_app
from bgen.cli.cells import app as cells_app
from bgen.cli.data import app as data_app
from bgen.cli.perturb import app as perturb_app
from bgen.cli.terminal import Json, Seed, notes, progress_bar, results
from bgen.cli.time import app as time_app
from bgen.distributed.report import report_user_error
from bgen.errors import UserError

app = typer.Typer(
    name="bgen",
    help="Generative models of gene expression: stream counts, train with DeepSpeed, hand a model to biologists.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Show and check configurations.", no_args_is_help=True)
app.add_typer(cells_app)
app.add_typer(time_app)
app.add_typer(perturb_app)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")
track_app = typer.Typer(help="What MLflow knows of runs.", no_args_is_help=True)
app.add_typer(track_app, name="track")

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides such as train.steps=500.", show_default=False)]


def version(show: bool) -> None:
    """Print the version and stop."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Hold the options that stand before every verb."""


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Your .h5ad of counts; default: simulated cells.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("bgen-demo"),
    seed: Seed = 0,
    overrides: Overrides = None,
) -> None:
    """Do the whole job once: simulate or take your data, check, build, train, generate, evaluate, report.

    Example: `bgen demo`, or `bgen demo --data my.h5ad --out my-demo`
    """
    from bgen.demo import run_demo

    run_demo(data, out, seed=seed, overrides=overrides or [], console=results, progress=progress_bar)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with bgen.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest verified checkpoint.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: also on other data than it began with.")
    ] = False,
) -> None:
    """Train a VAE or a flow; on several ranks under torchrun or deepspeed.

    Exit code: 0 when done; train.requeue_exit after a signal, with a checkpoint saved; 75 if there was no room for
    that checkpoint; 2 after a mistake that has to be mended first.

    Example: `bgen train configs/demo/vae.yaml train.steps=500`

    Example: `torchrun --nproc-per-node 2 -m bgen train configs/demo/vae.yaml`
    """
    from bgen.config.load import load_config
    from bgen.train.run import train as run

    if accept_changed_data and not resume:
        raise UserError("--accept-changed-data is about a run that goes on: give --resume as well.")
    loaded = load_config(config, overrides or [])
    if run(loaded, resume=resume, accept_changed_data=accept_changed_data).interrupted:
        raise typer.Exit(loaded.train.requeue_exit)


@app.command()
def launch(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with bgen.")],
    overrides: Overrides = None,
    target: Annotated[str, typer.Option(help="local, torchrun, deepspeed, slurm, k8s, jobset or sky.")] = "local",
    nodes: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes on each host: one per GPU.")] = 1,
    min_nodes: Annotated[int | None, typer.Option(min=1, help="Go on with so few when others are lost.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="name=value for the target; launch/README.md lists them.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Start the run as well.")] = False,
    out: Annotated[Path | None, typer.Option(help="New folder; default: the run's name and the target.")] = None,
) -> None:
    """Write readable launch files for a cluster, or for this machine.

    Example: `bgen launch demo/vae --target slurm --nodes 2 --ranks-per-node 8`
    """
    from bgen.operate.launch import launch as render

    if device not in ("cuda", "cpu"):
        raise UserError(f"--device is cuda or cpu, not '{device}'.")
    made = render(
        config,
        target,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        min_nodes=min_nodes,
        device=device,  # type: ignore[arg-type]
        overrides=overrides or [],
        settings=setting or [],
        submit=submit,
        out=out,
    )
    for file in made.files:
        results.print(str(file), highlight=False)
    if made.code is None:
        results.print(f"Start it with: {' '.join(made.command)}", highlight=False, soft_wrap=True)
    elif made.code:
        raise typer.Exit(made.code)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with bgen.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes on each host.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="Name of the GPU; default: CPUs like this machine's.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPU's peak that is reached.")] = 0.2,
    genes: Annotated[int | None, typer.Option(help="Genes, if the store is not there yet.")] = None,
    expressed: Annotated[
        int | None, typer.Option(help="Expressed genes a cell, if the store is not there yet.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will need: parameters, memory by ZeRO stage, FLOPs, speed, disk; trains nothing.

    Example: `bgen plan demo/vae --genes 500 --expressed 200 --nodes 2 --ranks-per-node 8 --gpu H100`
    """
    from bgen.operate.plan import plan as estimate

    made = estimate(
        config,
        overrides or [],
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpu=gpu,
        mfu=mfu,
        genes=genes,
        tokens=expressed,
    )
    if as_json:
        typer.echo(json.dumps(made.as_json()))
    else:
        results.print(made.table())


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where run folders will be: its disk is tried.")] = Path(),
    as_json: Json = False,
) -> None:
    """Look this machine over: packages, devices, kernels, disk, network, MLflow, a sum over two ranks.

    Example: `bgen doctor --folder runs`
    """
    from bgen.operate.doctor import doctor as look

    report = look(folder)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        results.print(report.table())
    if report.errors:
        raise typer.Exit(2)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder of `bgen train`.")],
    out: Annotated[Path, typer.Option(help="Folder of the model; must not be there, or be empty.")],
    log: Annotated[bool, typer.Option("--log", help="Also make it an artifact of the run at MLflow.")] = False,
    register: Annotated[
        str | None, typer.Option(help="Name at MLflow's model registry that gets it as a new version.")
    ] = None,
) -> None:
    """Write the newest verified checkpoint of a run as a model directory: safetensors and JSON, no pickle.

    Example: `bgen export runs/flow --out my-model --register blood`
    """
    from bgen.train.run import export as run_export

    run_export(run, out)
    results.print(f"Model: {out}")
    if log or register is not None:
        from bgen.track.publish import log_model

        results.print(f"MLflow: {log_model(run, out, register)}", highlight=False, soft_wrap=True)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    out: Annotated[Path, typer.Option(help="The .h5ad to write.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Cells to generate; with times, at each of them.")] = 1000,
    where: Annotated[list[str] | None, typer.Option(help="Condition asked for, column=value; may be repeated.")] = None,
    library_size: Annotated[
        float | None, typer.Option(min=1, help="Total counts per cell; default: generated.")
    ] = None,
    times: Annotated[
        str | None, typer.Option(help="Time points of whole trajectories, such as 0,24,48, or all.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is the conditional model.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Flow times, within 0 to 1, in which guidance acts.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun, midpoint or adaptive.")] = None,
    noise: Annotated[float | None, typer.Option(help="Spread of the noise it starts from; 1.05 covers more.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Generate cells as counts: single cells, or populations over time from a model that was trained on trajectories.

    Example: `bgen generate bgen-demo/model --n 1000 --where cell_type=T1 --out cells.h5ad`

    Example: `bgen generate runs/trajectories/model --times 0,24,48 --n 200 --out course.h5ad`
    """
    from bgen.files import require_new_file, write_h5ad
    from bgen.tasks.anndata_model import load_model, parse_times, parse_where

    require_new_file(out)
    loaded = load_model(model)
    with progress_bar() as progress:
        cells = loaded.generate(
            n,
            where=parse_where(where or []),
            library_size=library_size,
            times=parse_times(times),
            guidance=guidance,
            guidance_interval=guidance_interval,
            steps=steps,
            solver=solver,
            noise=noise,
            seed=seed,
            progress=progress,
        )
    write_h5ad(cells, out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "cells": cells.n_obs, "genes": cells.n_vars}))
    else:
        results.print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes: {out}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    data: Annotated[Path, typer.Option(help="Store with the splits train and test.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and metrics.json.")],
    generated: Annotated[Path | None, typer.Option(help="Score these cells instead of generating new ones.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with its own samples.")] = 3,
    run: Annotated[
        Path | None, typer.Option(help="Run folder of the model: its run at MLflow gets the scores as a child.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Score a model beside a per-type baseline and a real-versus-real ceiling, and write a report.

    Example: `bgen evaluate bgen-demo/model --data bgen-demo/store --out bgen-demo/report`
    """
    from bgen.tasks.evaluate import score

    with progress_bar() as progress:
        scores = score(model, data, out, generated=generated, seeds=seeds, seed=seed, progress=progress)
    if run is not None:
        from bgen.track.publish import log_evaluation

        child = log_evaluation(run, out.name, scores.means(), [out / "metrics.json", out / "report.html"])
        notes.print(f"MLflow: child run {child}", highlight=False)
    if as_json:
        typer.echo(json.dumps(scores.as_json()))
    else:
        results.print(scores.table())
        results.print(f"Report: {out / 'report.html'}")


@track_app.command("sync")
def track_sync(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    uri: Annotated[str | None, typer.Option(help="Tracking URI; default: the run's own.")] = None,
) -> None:
    """Send what MLflow did not receive: after an outage, or from hosts that cannot reach it.

    Example: `bgen track sync runs/vae runs/flow`
    """
    from bgen.track.publish import sync

    for run in runs:
        results.print(sync(run, uri), highlight=False, soft_wrap=True)


@config_app.command("show")
def config_show(
    config: str,
    overrides: Overrides = None,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="Show DeepSpeed's JSON instead.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that DeepSpeed's JSON is for.")] = 1,
) -> None:
    """Print the resolved configuration.

    Example: `bgen config show demo/vae train.steps=10`
    """
    from bgen.config.load import load_config, to_yaml

    loaded = load_config(config, overrides or [])
    if deepspeed:
        from bgen.train.engine.deepspeed_json import deepspeed_config

        typer.echo(json.dumps(deepspeed_config(loaded.train, ranks, loaded.out), indent=1))
    else:
        typer.echo(to_yaml(loaded), nl=False)


@config_app.command("check")
def config_check(config: str, overrides: Overrides = None) -> None:
    """Check a configuration: exit code 0 if it is valid, else 2 and what is wrong.

    Example: `bgen config check demo/vae train.steps=10`
    """
    from bgen.config.load import load_config

    load_config(config, overrides or [])
    typer.echo(f"{config} is valid.")


def main() -> None:
    """Run the command line: a user's mistake is one message and exit code 2, without a traceback."""
    # The deepspeed launcher puts --local_rank=N before our own arguments; LOCAL_RANK in the environment says the same.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    try:
        app()
    except UserError as error:
        sys.exit(report_user_error(error))
    except KeyboardInterrupt:
        notes.print("\nStopped.")
        sys.exit(130)
