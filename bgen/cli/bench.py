"""``bgen bench``: the verbs that measure quality, beside those of speed. Heavy imports stand inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bgen.cli.bench_speed import MOST, app
from bgen.cli.terminal import Overrides, notes, results
from bgen.errors import UserError

__all__ = ["app"]


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
    mixer: Annotated[
        str | None,
        typer.Option(help="Another mixer over time, of about as many parameters, such as attention or none."),
    ] = None,
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
        mixer=mixer,
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
    direct: Annotated[
        bool, typer.Option("--direct", help="Also a flow on log counts, without a VAE, and expectations.")
    ] = False,
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
        direct=direct,
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


@app.command("representations")
def bench_representations(
    out: Annotated[Path, typer.Option(help="Folder for representations.json, or data_types.json.")],
    file: Annotated[Path | None, typer.Argument(help="An .h5ad of counts.")] = None,
    label: Annotated[str | None, typer.Option(help="obs column of labels that the latents should tell apart.")] = None,
    data_types: Annotated[
        bool,
        typer.Option("--data-types", help="Instead of a file: simulated data of every structure, with known truth."),
    ] = False,
    genes: Annotated[int, typer.Option(min=50, max=MOST, help="Variable genes, chosen on training cells.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Splits, each with its own trainings.")] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Steps of each training, at most; default: 800 of a VAE.")
    ] = None,
    few: Annotated[int, typer.Option(min=0, max=MOST, help="Cells of a further, small training; 0: none.")] = 300,
    sets: Annotated[Path | None, typer.Option(help="Gene sets, .gmt: pathways as tokens, and shuffled.")] = None,
    network: Annotated[Path | None, typer.Option(help="Edges, CSV: regulators as tokens, and shuffled.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A row's name, or a table's of --data-types; repeatable. Default: all."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a comparison that was stopped.")] = False,
    overrides: Overrides = None,
) -> None:
    """Compare representations of a cell's genes (vector, sets, pathways, network) on whole cells and on poorer ones.

    Example: `bgen bench representations cells.h5ad --label cell_type --genes 100 --seeds 2 --steps 20 --out bench`
    """
    from bgen.bench.quality.data_types import bench_data_types
    from bgen.bench.quality.representations import bench_representations as compare

    if data_types:
        if file is not None or label is not None:
            raise UserError("--data-types simulates its data: give no file and no --label.")
        tables = bench_data_types(out, seeds=seeds, steps=steps, only=only or [], resume=resume, say=notes.print)
        for found in tables.values():
            results.print(found.table())
            for sentence in found.sentences():
                results.print(sentence, highlight=False)
        return
    if file is None or label is None:
        raise UserError("Give an .h5ad of counts and --label COLUMN, or --data-types.")
    found = compare(
        file,
        out,
        label=label,
        genes=genes,
        seeds=seeds,
        steps=steps or 800,
        few=few,
        sets=sets,
        network=network,
        only=only or [],
        overrides=overrides or [],
        resume=resume,
        say=notes.print,
    )
    results.print(found.table())
    for sentence in found.sentences():
        results.print(sentence, highlight=False)


@app.command("genes")
def bench_genes(
    file: Annotated[Path, typer.Argument(help="An .h5ad of counts.")],
    out: Annotated[Path, typer.Option(help="Folder for genes.json.")],
    overrides: Overrides = None,
    vectors: Annotated[list[Path] | None, typer.Option(help="CSV or TSV of gene vectors; may be repeated.")] = None,
    sets: Annotated[Path | None, typer.Option(help="Gene sets, .gmt, that genes are known by.")] = None,
    size: Annotated[int, typer.Option(min=1, max=MOST, help="Numbers of a vector that are kept.")] = 32,
    genes: Annotated[int, typer.Option(min=50, max=MOST, help="Variable genes, chosen on training cells.")] = 2000,
    share: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of them that training never sees.")] = 0.2,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Splits, each with its own trainings.")] = 3,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Training steps of each VAE, at most.")] = 800,
) -> None:
    """Withhold genes from training, add them by what is known of them, and measure what is told of them.

    Example: `bgen bench genes cells.h5ad --sets reactome.gmt --genes 200 --seeds 2 --steps 20 --out bench-genes`
    """
    from bgen.bench.quality.unseen_genes import bench_genes as measure

    measured = measure(
        file,
        out,
        vectors=vectors or [],
        sets=sets,
        size=size,
        genes=genes,
        share=share,
        seeds=seeds,
        steps=steps,
        overrides=overrides or [],
        say=notes.print,
    )
    results.print(measured.table())
    for sentence in measured.sentences():
        results.print(sentence, highlight=False)


@app.command("dna")
def bench_dna(
    out: Annotated[Path, typer.Option(help="Folder for dna.json.")],
    fasta: Annotated[Path | None, typer.Argument(help="Sequences of genes, FASTA, such as promoters.")] = None,
    cells: Annotated[Path | None, typer.Argument(help="An .h5ad of counts of the same genes.")] = None,
    by: Annotated[list[str] | None, typer.Option(help="obs column of groups; repeatable. Default: cell_type.")] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Simulated promoters in which order alone decides, instead of files.")
    ] = False,
    genes: Annotated[int, typer.Option(min=150, max=100_000, help="--simulated: promoters.")] = 1200,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Splits, each with its own trainings.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, max=MOST, help="Of each training; default: as trained.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A network; repeatable. Default: all.")] = None,
    vae_steps: Annotated[
        int, typer.Option(min=0, max=MOST, help="Of a VAE whose gene table is made from the vectors; 0: none.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a comparison that was stopped.")] = False,
) -> None:
    """Tell what genes do that training never saw from their sequences: k-mers, Hyena, Mamba-2, attention, convolutions.

    Example: `bgen bench dna --simulated --genes 150 --seeds 2 --epochs 1 --only hyena --out bench-dna`
    """
    from bgen.bench.sequences.dna import SIMULATED
    from bgen.bench.sequences.dna import bench_dna as compare
    from bgen.config.sequences import SequenceTraining

    training = SequenceTraining() if epochs is None else SequenceTraining(epochs=epochs)
    size = {**SIMULATED, "genes": genes} if simulated else None
    told = compare(
        fasta,
        cells,
        out,
        by=by or ["cell_type"],
        seeds=seeds,
        only=only or [],
        training=training,
        simulated=size,
        vae_steps=vae_steps,
        resume=resume,
        say=notes.print,
    )
    for found in told:
        results.print(found.table())
        for sentence in found.sentences():
            results.print(sentence, highlight=False)


@app.command("atlas")
def bench_atlas(
    out: Annotated[Path, typer.Option(help="Folder for atlas.json.")],
    contexts: Annotated[
        list[int] | None, typer.Option(min=1, max=20, help="Training contexts; default: 3, 6 and 12; repeatable.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Simulated screens: lines or crowd.")] = "lines",
    seeds: Annotated[int, typer.Option(min=1, max=MOST, help="Trainings of each, on an atlas of its own.")] = 3,
    cells: Annotated[
        int | None, typer.Option(min=2000, max=MOST, help="Cells of the atlas; default: the preset's.")
    ] = None,
    genes: Annotated[int | None, typer.Option(min=60, max=MOST, help="Its genes; default: the preset's.")] = None,
    vae_steps: Annotated[int, typer.Option(min=1, max=MOST, help="Training steps of the VAE.")] = 1500,
    flow_steps: Annotated[int, typer.Option(min=1, max=MOST, help="Training steps of the flow.")] = 2000,
    overrides: Overrides = None,
) -> None:
    """Pretrain on simulated screens in many contexts, and predict in contexts that were never seen.

    Example: `bgen bench atlas --contexts 6 --seeds 1 --out bench "flow.backbone={name: mlp, width: 128, layers: 3}"`
    """
    from bgen.bench.quality.atlas import Size, atlas_table
    from bgen.bench.quality.atlas import bench_atlas as compare

    size = Size(preset, cells, genes, vae_steps, flow_steps)
    found = compare(out, contexts or [3, 6, 12], size, seeds=seeds, overrides=overrides or [], say=notes.print)
    results.print(atlas_table(found))
    for key, scores in found.items():
        results.print(f"{key}: {scores.headline()}", highlight=False)


@app.command("perturb")
def bench_perturb(
    file: Annotated[Path, typer.Argument(help="The screen, .h5ad: raw counts in X.")],
    leave: Annotated[
        list[str],
        typer.Option(help="group:COLUMN, contexts:COLUMN, targets:N, combinations:N or doses; repeatable."),
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
