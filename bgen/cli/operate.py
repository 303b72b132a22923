"""Verbs for operating runs: what a run will need, launch files, and what this machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bgen.cli.terminal import Json, Overrides, notes, results
from bgen.errors import UserError, require_number

app = typer.Typer(help="Plan and launch runs, and inspect machines.")
tune_app = typer.Typer(help="Find settings for a run.", no_args_is_help=True)


@app.command()
def launch(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with bgen.")],
    overrides: Overrides = None,
    target: Annotated[str, typer.Option(help="local, torchrun, deepspeed, slurm, k8s, jobset or sky.")] = "local",
    nodes: Annotated[int, typer.Option(min=1, max=100_000, help="Hosts.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, max=1024, help="Processes on each host: one per GPU.")] = 1,
    min_nodes: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Go on with this many when others are lost.")
    ] = None,
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
    for note in made.notes:
        notes.print(note, highlight=False, soft_wrap=True, markup=False)
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
    nodes: Annotated[int, typer.Option(min=1, max=100_000, help="Hosts.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, max=1024, help="Processes on each host.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="Name of the GPU; default: CPUs like this machine's.")] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.0001, max=1, help="Share of the GPU's peak; default: estimated."),
    ] = None,
    network: Annotated[float, typer.Option(min=0.001, max=1e6, help="Gb/s of each rank's network card.")] = 400.0,
    genes: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="Genes, if the store is not there yet.")
    ] = None,
    expressed: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="Expressed genes a cell, if the store is not there yet.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will need: parameters, memory by ZeRO stage, FLOPs, speed, disk; trains nothing.

    Example: `bgen plan demo/vae --genes 500 --expressed 200 --nodes 2 --ranks-per-node 8 --gpu H100`
    """
    from bgen.operate.plan import plan as estimate

    if mfu is not None:
        require_number("--mfu", mfu, 0.0001, 1)
    made = estimate(
        config,
        overrides or [],
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpu=gpu,
        mfu=mfu,
        network=network,
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
    """Inspect this machine: packages, devices, kernels, disk, network, MLflow, a sum over two ranks.

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


@tune_app.command("lr")
def tune_lr(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with bgen.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=20, max=100_000, help="Steps of the test.")] = 100,
    low: Annotated[float, typer.Option(min=1e-12, max=1e3, help="Learning rate of the first step.")] = 1e-6,
    high: Annotated[float, typer.Option(min=1e-12, max=1e3, help="Learning rate of the last step.")] = 1.0,
    picture: Annotated[Path, typer.Option(help="PNG of losses against rates.")] = Path("learning-rate.png"),
    as_json: Json = False,
) -> None:
    """Suggest a learning rate: train a few steps with one that grows, and see where the loss falls fastest.

    It begins as the run would, on as many ranks, and leaves no run: a table, a picture and the setting.

    Example: `bgen tune lr demo/vae data.store=store --steps 100`
    """
    from bgen.config.load import load_config
    from bgen.distributed.world import read_world
    from bgen.operate.tune_lr import tune_learning_rate

    require_number("--low", low, 1e-12, 1e3)
    require_number("--high", high, 1e-12, 1e3)
    found = tune_learning_rate(load_config(config, overrides or []), steps=steps, low=low, high=high)
    if not read_world().is_main:
        return
    found.picture(picture)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    results.print(found.table())
    results.print(f"Picture: {picture}", highlight=False, soft_wrap=True)
    results.print(found.setting, highlight=False)
