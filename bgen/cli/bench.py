"""``bgen bench ...``: verbs to functions. Heavy imports stand inside the verbs, so ``--help`` is quick."""

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
) -> None:
    """Measure the stream of counts beside other loaders, on one synthetic atlas.

    Example: `bgen bench loader --out bench --cells 20000`
    """
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


@app.command("time")
def bench_time(
    file: Annotated[Path, typer.Argument(help="The course: .csv (emt), .npz (eb), .h5ad (worm, simulated).")],
    data: Annotated[str, typer.Option(help="emt, eb, worm or simulated (of `bgen data simulate`).")],
    out: Annotated[Path, typer.Option(help="Folder for time.json.")],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings of every left-out time point.")] = 3,
    point: Annotated[
        list[float] | None, typer.Option(min=-1e9, max=1e9, help="Time point left out; default: each inner one.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Training steps of what is trained; default: each its own.")
    ] = None,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="From the time points before alone; counts only.")
    ] = False,
    both: Annotated[
        bool, typer.Option("--both", help="Interpolate with what also learns to forecast, as --forecast trains it.")
    ] = False,
    solver_steps: Annotated[int, typer.Option(min=1, max=MOST, help="Solver steps of the flow.")] = 4,
) -> None:
    """Leave time points of a course out, generate them, and compare with baselines and OT-CFM.

    Example: `bgen bench time cells.h5ad --data simulated --point 24 --seeds 2 --steps 20 --out bench-time`
    """
    from bgen.bench.quality.time import bench_time as compare

    compared = compare(
        data,
        file,
        out,
        seeds=seeds,
        points=point,
        steps=steps,
        say=notes.print,
        forecast=forecast,
        both=both,
        solver_steps=solver_steps,
    )
    results.print(compared.table())


@app.command("cells")
def bench_cells(
    file: Annotated[Path, typer.Argument(help="An .h5ad of counts.")],
    out: Annotated[Path, typer.Option(help="Folder for cells.json.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides such as vae.train.steps=500.", show_default=False)
    ] = None,
    genes: Annotated[
        int, typer.Option(min=0, max=MOST, help="Variable genes, chosen on the training cells; 0: all.")
    ] = 2000,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Splits, each with its own training.")] = 3,
    steps: Annotated[str, typer.Option(help="Numbers of solver steps.")] = "50,4,1",
    python: Annotated[Path | None, typer.Option(help="A Python with scvi-tools, to stand in the table.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=MOST, help="Of scvi-tools; default: its own.")] = None,
) -> None:
    """Train on four fifths of a data set, generate, and compare with the other fifth: flow, VAE, baseline, peer.

    Example: `bgen bench cells cells.h5ad --genes 100 --seeds 2 --out bench vae.train.steps=20 flow.train.steps=20`
    """
    from bgen.bench.quality.cells import bench_cells as compare

    try:
        numbers = [int(text) for text in steps.split(",")]
    except ValueError:
        raise UserError(f"--steps {steps}: numbers with commas, such as 50,4,1.") from None
    compared = compare(
        file,
        out,
        genes=genes,
        seeds=seeds,
        steps=numbers,
        python=python,
        epochs=epochs,
        overrides=overrides or [],
        say=notes.print,
    )
    results.print(compared.table())
    results.print(compared.headline(), highlight=False)


@app.command("cheats")
def bench_cheats(
    file: Annotated[Path, typer.Argument(help="An .h5ad of counts.")],
    label: Annotated[str, typer.Option(help="obs column of cell types.")],
    out: Annotated[Path, typer.Option(help="Folder for cheats.json.")],
    cells: Annotated[int, typer.Option(min=20, max=1000, help="Cells on each side of a comparison.")] = 600,
    seeds: Annotated[int, typer.Option(min=2, max=1000, help="Repetitions of every figure.")] = 3,
) -> None:
    """Pass off cells that are made to deceive as a model's, and tell which measure catches them.

    Example: `bgen bench cheats cells.h5ad --label cell_type --cells 60 --seeds 2 --out bench-cheats`
    """
    from bgen.bench.quality.cheats import bench_cheats as score

    told = score(file, out, label=label, cells=cells, seeds=seeds, say=notes.print)
    results.print(told.table())
    results.print(told.headline(), highlight=False)


@app.command("perturb")
def bench_perturb(
    file: Annotated[Path, typer.Argument(help="The screen, .h5ad: raw counts in X.")],
    leave: Annotated[
        list[str], typer.Option(help="group:COLUMN, targets:N, combinations:N or doses; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for perturb.json and a page for each --leave.")],
    perturbation: Annotated[str, typer.Option(help="obs column that names the perturbation.")] = "perturbation",
    control: Annotated[
        list[str] | None, typer.Option(help="Its value for control cells; default: control; may be repeated.")
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Between the names of a label; default: found, or '+'.")] = None,
    dose: Annotated[str | None, typer.Option(help="obs column of doses.")] = None,
    within: Annotated[list[str] | None, typer.Option(help="Compare within this obs column; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=MOST, help="Trainings of every split.")] = 3,
    steps: Annotated[
        int, typer.Option(min=2, max=MOST, help="Training steps of the VAE; the flow has half as many.")
    ] = 800,
    sets: Annotated[
        Path | None, typer.Option(help="Gene sets, .gmt: a baseline for unseen targets that shares them.")
    ] = None,
    cell_eval: Annotated[bool, typer.Option("--cell-eval", help="Also cell-eval's figures (extra perturb).")] = False,
    overrides: Overrides = None,
) -> None:
    """Leave groups, targets, combinations or doses of a screen out, predict them, and compare with baselines.

    Example: `bgen bench perturb cells.h5ad --leave group:batch --leave targets:2 --within cell_type --out bench`
    """
    from bgen.bench.quality.perturb import Training
    from bgen.bench.quality.perturb import bench_perturb as compare
    from bgen.evaluate.protocols.cell_eval import figures_table
    from bgen.tasks.perturb.screen import Columns

    columns = Columns(perturbation, control or "control", dose, within or [], separator)
    training = Training(steps, overrides or [])
    done = compare(file, columns, leave, out, training, seeds=seeds, cell_eval=cell_eval, say=notes.print, sets=sets)
    for left_out, found in done.items():
        results.print(f"\nLeft out: {left_out}", highlight=False)
        results.print(found.scores.headline(), highlight=False)
        results.print(found.scores.table())
        for sentence in found.scores.sentences():
            results.print(sentence, highlight=False)
        if found.cell_eval is not None:
            results.print(figures_table(found.cell_eval))
