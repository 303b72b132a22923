"""Verbs that take a user's cells and give them back with more: the typer functions behind ``bgen annotate`` and others.

Heavy imports stand inside the verbs, so ``--help`` is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bgen.cli.options import Data, Device, Precision, cells_options, read_cells, with_options
from bgen.cli.terminal import Json, Seed, notes, parse_scales, parse_times, parse_where, progress_bar, results
from bgen.errors import MOST_CELLS, MOST_COUNTS, UserError
from bgen.files import require_new_h5ad, write_h5ad

if TYPE_CHECKING:
    from anndata import AnnData

    from bgen.tasks.blocks.run import Done

app = typer.Typer(help="What a model does with your cells.")

ModelFolder = Annotated[Path, typer.Argument(help="Model directory.")]
Out = Annotated[Path, typer.Option(help="The .h5ad to write.")]
Genes = Annotated[
    list[str] | None,
    typer.Option(help="Only these genes, by id or symbol, with commas between; may be repeated. Default: all."),
]
OutInBlocks = Annotated[
    Path,
    typer.Option(
        help="The .h5ad to write, made in memory; or a new NAME.zarr, made a block of cells at a time, for any number"
        " of cells: by any number of ranks (torchrun -m bgen ...), and the same command goes on after a stop."
    ),
]
Neighbours = Annotated[
    int | None,
    typer.Option(
        min=2, max=1_000, help="Also the graph of so many nearest neighbours, where scanpy looks for it (sc.tl.umap)."
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what another run left of --out NAME.zarr.")]


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    out: Annotated[Path, typer.Option(help="The .h5ad to write.")],
    n: Annotated[
        int, typer.Option("--n", min=1, max=MOST_CELLS, help="Cells to generate; with times, at each.")
    ] = 1000,
    where: Annotated[list[str] | None, typer.Option(help="Condition asked for, column=value; may be repeated.")] = None,
    library_size: Annotated[
        float | None, typer.Option(min=1, max=MOST_COUNTS, help="Total counts per cell; default: generated.")
    ] = None,
    times: Annotated[
        str | None, typer.Option(help="Time points of whole trajectories, such as 0,24,48, or all.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=1000, help="Guidance scale; 1 is the conditional model.")
    ] = None,
    guidance_of: Annotated[
        list[str] | None, typer.Option(help="Guidance scale of one condition, column=scale; may be repeated.")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(min=0, max=1, help="Flow times, within 0 to 1, in which guidance acts."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=10_000, help="Solver steps.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun, midpoint or adaptive.")] = None,
    noise: Annotated[
        float | None, typer.Option(min=0.001, max=100, help="Spread of the noise at the start; 1.05 covers more.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Generate cells as counts: single cells, or populations over time from a model that was trained on trajectories.

    Example: `bgen generate bgen-demo/model --n 1000 --where cell_type=B --out cells.h5ad`

    Example: `bgen generate runs/trajectories/model --times 0,24,48 --n 200 --out course.h5ad`
    """
    from bgen.files import require_new_h5ad, write_h5ad
    from bgen.tasks.load import load_model

    require_new_h5ad(out)
    loaded = load_model(model, device, precision=precision)
    with progress_bar() as progress:
        cells = loaded.generate(
            n,
            where=parse_where(where or []),
            library_size=library_size,
            times=parse_times(times),
            guidance=guidance,
            guidance_of=parse_scales(guidance_of),
            guidance_interval=guidance_interval,
            steps=steps,
            solver=solver,
            noise=noise,
            seed=seed,
            progress=progress,
        )
    write_h5ad(cells, out)
    unseen = bool(cells.uns["bgen"]["unseen"])
    if as_json:
        typer.echo(json.dumps({"out": str(out), "cells": cells.n_obs, "genes": cells.n_vars, "unseen": unseen}))
    else:
        if unseen:
            notes.print("No training cell had all of these conditions: the model combines what it knows of each.")
        results.print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes: {out}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    data: Annotated[Path, typer.Option(help="Store with the splits train and test.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and metrics.json.")],
    generated: Annotated[Path | None, typer.Option(help="Score these cells instead of generating new ones.")] = None,
    seeds: Annotated[int, typer.Option(min=2, max=1000, help="Repetitions, each with its own samples.")] = 3,
    run: Annotated[
        Path | None, typer.Option(help="Run folder of the model: its run at MLflow gets the scores as a child.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Score a model beside a negative binomial per cluster and a real-versus-real ceiling, and write a report.

    Example: `bgen evaluate bgen-demo/model --data bgen-demo/store --out bgen-demo/report`
    """
    from bgen.tasks.evaluate import score
    from bgen.tasks.load import load_model

    with progress_bar() as progress:
        scores = score(
            load_model(model, device, precision=precision),
            data,
            out,
            generated=generated,
            seeds=seeds,
            seed=seed,
            progress=progress,
        )
    if run is not None:
        from bgen.track.publish import log_evaluation

        child = log_evaluation(run, out.name, scores.means(), [out / "metrics.json", out / "report.html"])
        notes.print(f"MLflow: child run {child}", highlight=False)
    if as_json:
        typer.echo(json.dumps(scores.as_json()))
    else:
        results.print(scores.table())
        results.print(scores.headline(), highlight=False)
        results.print(f"Report: {out / 'report.html'}")


@app.command()
@with_options(reading=cells_options)
def embed(
    model: ModelFolder,
    data: Data,
    out: OutInBlocks,
    variance: Annotated[
        bool, typer.Option("--variance", help="Also the variance of each latent state, in obsm['X_bgen_variance'].")
    ] = False,
    neighbours: Neighbours = None,
    restart: Restart = False,
    *,
    reading: Any,
    device: Device = "auto",
    precision: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Put the latent state of the cells into obsm['X_bgen'].

    Example: `bgen embed bgen-demo/model my.h5ad --out embedded.h5ad`

    Example: `torchrun --nproc-per-node 8 -m bgen embed model s3://bucket/store --out embedded.zarr`
    """
    from bgen.distributed.world import compute_on
    from bgen.tasks.blocks.verbs import embed_in_blocks
    from bgen.tasks.load import load_model

    if _in_blocks(out, restart):
        if neighbours is not None:
            raise UserError("--neighbours compares all cells with each other: it is for --out NAME.h5ad.")
        compute_on(device)
        loaded = load_model(model, device, precision=precision)
        with progress_bar() as progress:
            options = {"variance": variance, "restart": restart, "progress": progress, "say": _say(as_json)}
            done = embed_in_blocks(loaded, data, out, reading, **options)
        _finish_blocks(done, out, {"dimensions": loaded.saved.codec.size - 1}, [], as_json)
        return
    loaded = load_model(model, device, precision=precision)
    read = read_cells(loaded, data, reading, as_json)
    cells = loaded.embed(read, variance=variance, neighbours=neighbours)
    _finish(cells, out, read.matched, {"dimensions": cells.obsm["X_bgen"].shape[1]}, [], as_json)


@app.command()
@with_options(reading=cells_options)
def annotate(
    model: ModelFolder,
    data: Data,
    out: OutInBlocks,
    label: Annotated[
        str | None,
        typer.Option(help="obs column: cells with a value there are the reference; default: the model's own."),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least probability; below it, 'unknown'.")] = 0.5,
    restart: Restart = False,
    *,
    reading: Any,
    device: Device = "auto",
    precision: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Label cells, with a probability, and 'unknown' where the model cannot tell.

    Learns from your labelled cells; without any, from the model's own training labels of that name.

    Example: `bgen annotate bgen-demo/model my.h5ad --label cell_type --out annotated.h5ad`
    """
    from bgen.distributed.world import compute_on
    from bgen.tasks.blocks.verbs import annotate_in_blocks
    from bgen.tasks.load import load_model

    if _in_blocks(out, restart):
        compute_on(device)
        loaded = load_model(model, device, precision=precision)
        with progress_bar() as progress:
            options = {
                "label": label,
                "threshold": threshold,
                "restart": restart,
                "progress": progress,
                "say": _say(as_json),
            }
            done = annotate_in_blocks(loaded, data, out, reading, **options)
        told = done.uns["bgen_annotate"]
        _finish_blocks(done, out, told, _annotated(told), as_json)
        return
    loaded = load_model(model, device, precision=precision)
    read = read_cells(loaded, data, reading, as_json)
    cells = loaded.annotate(read, label, threshold=threshold)
    told = dict(cells.uns["bgen_annotate"])
    _finish(cells, out, read.matched, told, _annotated(told), as_json)


def _annotated(told: dict[str, Any]) -> list[str]:
    """Say what was annotated, and from what."""
    said = [
        f"{told['query_cells']:,} cells annotated from {sum(told['reference_cells'].values()):,} {told['reference']};"
        f" {told['abstained']:,} left unknown.",
    ]
    if told.get("too_rare"):
        rare = ", ".join(f"{name} ({n})" for name, n in told["too_rare"].items())
        said.append(f"Labels of too few cells to learn from, whose cells are annotated like the others: {rare}.")
    if "macro_f1" in told:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in told["macro_f1"].items())
        said.append(f"Macro-F1, cross-validated on the reference: {scores}. Labels were told by {told['seen']}.")
    return said


@app.command()
@with_options(reading=cells_options)
def denoise(
    model: ModelFolder,
    data: Data,
    out: OutInBlocks,
    library_size: Annotated[
        float | None, typer.Option(min=1, max=MOST_COUNTS, help="Total counts of each cell; default: its own.")
    ] = None,
    genes: Genes = None,
    restart: Restart = False,
    *,
    reading: Any,
    device: Device = "auto",
    precision: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Put expected counts, given each cell's state, into layers['denoised'].

    Example: `bgen denoise bgen-demo/model my.h5ad --out denoised.h5ad`

    Example: `bgen denoise bgen-demo/model store --genes CD3E,CD19 --out denoised.zarr`
    """
    from bgen.distributed.world import compute_on, read_world
    from bgen.tasks.blocks.verbs import denoise_in_blocks
    from bgen.tasks.cells.denoise import denoising_scores
    from bgen.tasks.load import load_model

    named = _named(genes)
    if _in_blocks(out, restart):
        compute_on(device)
        loaded = load_model(model, device, precision=precision)
        with progress_bar() as progress:
            options = {
                "library_size": library_size,
                "genes": named,
                "restart": restart,
                "progress": progress,
                "say": _say(as_json),
            }
            done = denoise_in_blocks(loaded, data, out, reading, **options)
        ranks, told = read_world(), dict(done.uns["bgen_denoise"])
        if ranks.is_main:  # the others need not wait
            told["deviance"] = denoising_scores(loaded, done.verb.cells.some())
        _finish_blocks(done, out, told, _scored(told["deviance"]) if ranks.is_main else [], as_json)
        return
    loaded = load_model(model, device, precision=precision)
    read = read_cells(loaded, data, reading, as_json)
    cells = loaded.denoise(read, library_size=library_size, genes=named)
    scores = denoising_scores(loaded, read)
    told = {**cells.uns["bgen_denoise"], "deviance": scores}
    said = _scored(scores)
    if told["genes_unknown_to_the_model"]:
        said.append(f"{told['genes_unknown_to_the_model']:,} genes unknown to the model are NaN.")
    _finish(cells, out, read.matched, told, said, as_json)


def _scored(scores: dict[str, Any]) -> list[str]:
    """Say how good denoising is on molecules that were held out."""
    said = [
        "Poisson deviance on molecules held out (lower is better): "
        f"{scores['model']:.1f}; best PCA {scores['pca']:.1f}, mean profile {scores['mean']:.1f},"
        f" raw {scores['raw']:.1f}. Against the best of these: {scores.get('verdict', 'cannot tell')}."
    ]
    if "calibration" in scores:
        covered = scores["calibration"]
        said.append(
            "Held-out counts within the central 50 and 90 % that the model gives them:"
            f" {covered['coverage_50']:.0%} and {covered['coverage_90']:.0%}."
        )
    return said


@app.command()
@with_options(reading=cells_options)
def integrate(
    model: ModelFolder,
    data: Data,
    out: Out,
    reference: Annotated[str | None, typer.Option(help="Batch to decode as; default: the largest.")] = None,
    batch: Annotated[str | None, typer.Option(help="Covariate to remove; default: batch.")] = None,
    label: Annotated[
        str | None, typer.Option(help="obs column of cell types: also score by scib-metrics (bgen-flow[integration]).")
    ] = None,
    neighbours: Neighbours = None,
    genes: Genes = None,
    *,
    reading: Any,
    device: Device = "auto",
    precision: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Put a latent state without batch effects into obsm, and counts as of one batch into a layer.

    Example: `bgen integrate bgen-demo/model my.h5ad --out integrated.h5ad`
    """
    from bgen.tasks.load import load_model

    require_new_h5ad(out)
    loaded = load_model(model, device, precision=precision)
    read = read_cells(loaded, data, reading, as_json)
    cells = loaded.integrate(
        read, reference=reference, batch=batch, label=label, neighbours=neighbours, genes=_named(genes)
    )
    told = dict(cells.uns["bgen_integrate"])
    said = [f"Counts in layers['integrated'] are as of {told['batch']} '{told['reference']}'."]
    if "mixing" in told:
        said.append(
            f"Mixing of batches (1 is perfect): {told['mixing']:.2f}; principal components {told['mixing_pca']:.2f}."
        )
    for figure, values in told.get("scib", {}).items():
        said.append(f"{figure:>20} " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    if told["cells_of_unknown_batches"]:
        said.append(f"{told['cells_of_unknown_batches']:,} cells are of batches that the model does not know.")
    _finish(cells, out, read.matched, told, said, as_json)


def _named(genes: list[str] | None) -> list[str] | None:
    """Return the genes of an option that may be repeated and may hold several, with commas between."""
    return None if genes is None else [name.strip() for text in genes for name in text.split(",") if name.strip()]


def _in_blocks(out: Path, restart: bool) -> bool:
    """Whether cells are read and written a block at a time, as ``--out NAME.zarr`` asks for.

    Raises
    ------
    UserError
        If ``--out`` names neither an .h5ad nor a .zarr that can be written, or is an .h5ad and several ranks are there.
    """
    from bgen.distributed.world import read_world

    if out.suffix == ".zarr":
        return True
    if restart:
        raise UserError(f"--restart is for --out NAME.zarr, which is made in blocks; {out} is made at once.")
    if read_world().size > 1:
        raise UserError(f"{out} is made by one process. Several ranks share the cells with --out NAME.zarr.")
    require_new_h5ad(out)
    return False


def _say(quiet: bool) -> Any:
    """Return what is told sentences while cells are read."""
    return None if quiet else lambda sentence: notes.print(sentence, highlight=False, soft_wrap=True)


def _finish_blocks(done: Done, out: Path, told: dict[str, Any], said: list[str], as_json: bool) -> None:
    """Say what was written a block at a time; rank 0 speaks for all."""
    from bgen.distributed.world import read_world

    if not read_world().is_main:
        return
    cells, matched = done.verb.cells, done.matched
    genes = len(done.verb.var)
    if as_json:
        shape = {"out": str(out), "cells": len(cells), "genes": genes, "matched": matched.as_json()}
        typer.echo(json.dumps({**shape, **told}, default=float))
        return
    for sentence in matched.sentences():
        if sentence not in cells.matched.sentences():  # of which nothing could be said before all were read
            notes.print(sentence, highlight=False, soft_wrap=True)
    for line in said:
        results.print(line, highlight=False)
    results.print(f"{len(cells):,} cells x {genes:,} genes: {out}", highlight=False, soft_wrap=True)


def _finish(cells: AnnData, out: Path, matched: Any, told: dict[str, Any], said: list[str], as_json: bool) -> None:
    """Write the cells, and say what was done; as JSON also what was matched."""
    write_h5ad(cells, out)
    if as_json:
        shape = {"out": str(out), "cells": cells.n_obs, "genes": cells.n_vars, "matched": matched.as_json()}
        typer.echo(json.dumps({**shape, **told}, default=float))
        return
    for line in said:
        results.print(line, highlight=False)
    results.print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes: {out}", highlight=False, soft_wrap=True)
