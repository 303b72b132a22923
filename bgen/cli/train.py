"""Verbs of training: configurations, runs, exported models, what MLflow knows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bgen.cli.terminal import Overrides, notes, results
from bgen.errors import UserError

app = typer.Typer(help="Train and export.")
config_app = typer.Typer(help="Show and check configurations.", no_args_is_help=True)
track_app = typer.Typer(help="What MLflow knows of runs.", no_args_is_help=True)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with bgen.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest verified checkpoint.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: also with other data than the run began with.")
    ] = False,
) -> None:
    """Train a VAE or a flow; on several ranks under torchrun or deepspeed.

    Exit code: 0 when done; train.requeue_exit after a signal, with a checkpoint saved; 75 if there was no room for
    that checkpoint; 2 after a mistake that has to be mended first.

    Example: `bgen train configs/demo/vae.yaml train.steps=500`

    Example: `torchrun --nproc-per-node 2 -m bgen train configs/demo/vae.yaml`
    """
    from bgen.config.load import load_config
    from bgen.distributed.world import read_world
    from bgen.train.run import train as run

    if accept_changed_data and not resume:
        raise UserError("--accept-changed-data is about a run that goes on: give --resume as well.")
    loaded = load_config(config, overrides or [])
    if run(loaded, resume=resume, accept_changed_data=accept_changed_data).interrupted:
        if read_world().is_main:
            notes.print("Go on with --resume.")
        raise typer.Exit(loaded.train.requeue_exit)


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
        from bgen.serve.pyfunc import SERVED
        from bgen.track.publish import log_model

        results.print(f"MLflow: {log_model(run, out, SERVED, register)}", highlight=False, soft_wrap=True)


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    address: Annotated[str, typer.Argument(help="hf://owner/name, hf://owner/name@branch, or models:/name.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made now: for its owner alone.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit or version.")] = "A model of bgen",
) -> None:
    """Put a model directory into a repository at Hugging Face's hub (extra `hub`; HF_TOKEN says who you are), or as a
    new version into MLflow's registry (MLFLOW_TRACKING_URI says where).

    `bgen.load("hf://owner/name", revision=...)`, `bgen.load("models:/name/1")` and every command that takes a model
    directory read it from there. `mlflow models serve -m models:/name/1 --env-manager local` answers as `bgen serve`.

    Example: `bgen push model hf://my-lab/blood --private`

    Example: `bgen push model models:/blood`
    """
    from bgen.hub.directory import load_directory
    from bgen.hub.huggingface import push as send
    from bgen.track.registry import is_address, register

    load_directory(model)  # it is whole
    if is_address(address):
        from bgen.serve.pyfunc import SERVED

        if private:
            raise UserError("--private is for a hub: who may read a registry is its server's to say.")
        results.print(f"Model: {register(model, address, SERVED, message)}", highlight=False, soft_wrap=True)
        return
    commit = send(model, address, private=private, message=message)
    results.print(f"Model: {address.partition('@')[0]}@{commit}", highlight=False, soft_wrap=True)


@config_app.command("show")
def config_show(
    config: str,
    overrides: Overrides = None,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="Show DeepSpeed's JSON instead.")] = False,
    ranks: Annotated[int, typer.Option(min=1, max=1_000_000, help="Ranks that DeepSpeed's JSON is for.")] = 1,
) -> None:
    """Print the resolved configuration.

    Example: `bgen config show demo/vae train.steps=10`
    """
    from bgen.config.load import load_either, to_yaml

    loaded = load_either(config, overrides or [])
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
    from bgen.config.load import load_either

    load_either(config, overrides or [])
    results.print(f"{config} is valid.", highlight=False, soft_wrap=True)


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
