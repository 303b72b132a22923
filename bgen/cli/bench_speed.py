"""``bgen bench``: the verbs that measure speed and memory. Heavy imports stand inside them, so ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bgen.cli.terminal import Overrides, notes, results
from bgen.errors import UserError

MOST = 10_000_000
"""Cells, genes, steps or seconds, at most."""

app = typer.Typer(help="Measure throughput and quality, beside peers where they are installed.", no_args_is_help=True)


@app.command("loader")
def bench_loader(
    out: Annotated[Path, typer.Option(help="Folder for loader.json and loader.png.")],
    cells: Annotated[int, typer.Option(min=1000, max=MOST, help="Cells of the synthetic atlas.")] = 400_000,
    atlas: Annotated[Path | None, typer.Option(help="Where the atlas is kept; default: the user's cache.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Loader to measure beside bgen; may be repeated.")] = None,
    python: Annotated[
        list[str] | None, typer.Option(help="Python that has a peer, NAME=PATH ('*': all others); may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=MOST, help="Length of each measurement.")] = 4.0,
    repetitions: Annotated[int, typer.Option(min=1, max=MOST, help="Measurements of each case, interleaved.")] = 3,
    threads: Annotated[int, typer.Option(min=2, max=MOST, help="Threads of the cases with several.")] = 2,
    latency: Annotated[
        list[int] | None,
        typer.Option(min=0, max=60_000, help="Measure a server that answers so many ms late instead; may be repeated."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=1024, help="--latency: requests at a time.")] = 64,
) -> None:
    """Measure the stream of counts beside other loaders, on one synthetic atlas.

    Example: `bgen bench loader --out bench --cells 20000`

    Example: `bgen bench loader --out bench --latency 50 --latency 200 --requests 128`
    """
    if latency:
        from bgen.bench.loaders.loaders import bench_late

        bench_late(
            out,
            latency,
            cells=cells,
            atlas_folder=atlas,
            requests=requests,
            seconds=seconds,
            repetitions=repetitions,
            say=notes.print,
        )
        return
    from bgen.bench.loaders.loaders import bench_loader as measure

    pythons = {}
    for text in python or []:
        name, sign, path = text.partition("=")
        if not sign:
            raise UserError(f"--python {text}: write NAME=PATH, such as annbatch=/opt/venv/bin/python.")
        pythons[name] = Path(path)
    measure(
        out,
        cells=cells,
        atlas_folder=atlas,
        peers=peer,
        pythons=pythons,
        seconds=seconds,
        repetitions=repetitions,
        threads=threads,
        say=notes.print,
    )


@app.command("growth")
def bench_growth(
    out: Annotated[Path, typer.Option(help="Folder for growth.json, with room for the largest number of cells.")],
    cells: Annotated[
        list[int] | None, typer.Option(min=1000, max=1_000_000_000, help="Number of cells; give two or more.")
    ] = None,
    step: Annotated[list[str] | None, typer.Option(help="Only this step; may be repeated. Default: all.")] = None,
    world: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MOST, help="Simulate ranks of such a world of 10^9 cells instead; may be repeated."),
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="--world: data.lanes; default: the ranks of the largest world.")
    ] = None,
) -> None:
    """Measure how much memory each process takes for each cell: check, build, ranks, evaluation, exports.

    Example: `bgen bench growth --out bench --cells 1000000 --cells 4000000`

    Example: `bgen bench growth --out bench --world 8 --world 1024`
    """
    if world:
        from bgen.bench.loaders.worlds import CELLS, simulate

        simulate(out, world, cells=(cells or [CELLS])[0], lanes=lanes, say=notes.print)
        return
    from bgen.bench.loaders.growth import bench_growth as measure

    measure(out, cells=cells or [1_000_000, 4_000_000], steps=step or [], say=notes.print)


@app.command("train")
def bench_train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with bgen.")] = "demo/flow",
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Cells of a step; default: the configuration's.")
    ] = None,
    genes: Annotated[int, typer.Option(min=1, max=MOST, help="Genes of a VAE.")] = 20_000,
    compare: Annotated[bool, typer.Option("--compare", help="Time mixers over time at equal parameters.")] = False,
    versus: Annotated[str | None, typer.Option(help="scvi: train a VAE beside scvi-tools'.")] = None,
    data: Annotated[Path | None, typer.Option(help="--versus: an .h5ad of counts; default: simulated cells.")] = None,
    python: Annotated[Path | None, typer.Option(help="--versus: the Python that has the other; default: this.")] = None,
    epochs: Annotated[int, typer.Option(min=2, max=MOST, help="--versus: passes over the training cells.")] = 100,
    repetitions: Annotated[
        int, typer.Option(min=1, max=MOST, help="--versus: trainings of each, in turn; medians.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="--versus: threads; default: as many as each takes by itself.")
    ] = None,
    busy: Annotated[
        int, typer.Option(min=0, max=MOST, help="--versus: processes that each keep a core busy meanwhile.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder for what --compare and --versus write.")] = Path("bench"),
) -> None:
    """Measure the training step of a configuration, with --compare every mixer over time, or with --versus a VAE.

    Example: `bgen bench train demo/flow --batch 64`

    Example: `bgen bench train --versus scvi --python peers/bin/python --data cells.h5ad`
    """
    if versus is not None:
        from bgen.bench.speed.versus import versus as measure_versus

        measure_versus(
            versus,
            out,
            data=data,
            python=python,
            batches=(128, 1024) if batch is None else (batch,),
            epochs=epochs,
            threads=threads,
            busy=busy,
            repetitions=repetitions,
            say=notes.print,
        )
        return
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is cpu or cuda, not '{device}'.")
    if compare:
        from bgen.bench.speed.mixers import compare as measure_mixers

        measured = measure_mixers(out, device=device)
    else:
        from bgen.bench.speed.train_step import bench_train as measure
        from bgen.config.load import load_config

        measured = measure(load_config(config, overrides or []), device=device, batch=batch, genes=genes)
    typer.echo(json.dumps(measured, indent=1))


@app.command("ssd")
def bench_ssd(
    repetitions: Annotated[
        int, typer.Option(min=1, max=MOST, help="Runs of the plain loop; the others run more often.")
    ] = 3,
) -> None:
    """Measure the chunked state-space scan beside the plain loop, on one thread.

    Example: `bgen bench ssd --repetitions 1`
    """
    from bgen.bench.speed.ssd import bench_ssd as measure

    typer.echo(json.dumps(measure(repetitions, say=notes.print), indent=1))


@app.command("gpu")
def bench_gpu(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and the mixers' table and picture.")],
    device: Annotated[str, typer.Option(help="cuda, or cpu: the same lines in small.")] = "cuda",
    minutes: Annotated[float, typer.Option(min=0.1, max=1e4, help="After so many, nothing new is begun.")] = 8.0,
) -> None:
    """Find out on a card what is right, how fast it is and what it holds: parity, steps, sampling, loading, mixers.

    Exit code 1: something differs from the CPU by more than rounding.

    Example: `bgen bench gpu --device cpu --out bench`
    """
    from bgen.bench.speed.gpu import bench_gpu as measure

    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is cpu or cuda, not '{device}'.")
    found = measure(out, device=device, minutes=minutes, say=notes.print)
    results.print(found.tables())
    if not found.agrees:
        raise typer.Exit(1)
