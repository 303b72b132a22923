"""``bgen finetune``. Heavy imports stand inside the verb, so ``--help`` is quick."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bgen.cli.options import Data, Device, GeneColumn, cells_options, with_options
from bgen.cli.terminal import Json, notes, results

app = typer.Typer(help="Adapt a model to your cells.")


def request_options(
    task: Annotated[str, typer.Option(help="generate, annotate, perturb or time.")],
    mode: Annotated[str, typer.Option(help="full, lora or head: how much is trained.")] = "full",
    label: Annotated[str | None, typer.Option(help="annotate: obs column of labels.")] = None,
    perturbation: Annotated[str | None, typer.Option(help="perturb: obs column that names the perturbation.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="perturb: its value for control cells; may be repeated.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="perturb: between the names of a label; none: one name; default: found, '+'.")
    ] = None,
    dose: Annotated[str | None, typer.Option(help="perturb: obs column of doses.")] = None,
    within: Annotated[
        list[str] | None,
        typer.Option(help="perturb: compare, time: trajectories within this obs column; may be repeated."),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(help="perturb: keep LABEL (or LABEL@DOSE) from training and score predictions; may be repeated."),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(help="perturb: CSV of a regulatory network (source, target, weight), for unseen targets."),
    ] = None,
    time: Annotated[str | None, typer.Option(help="time: obs column with the time of each cell.")] = None,
    add_genes: Annotated[bool, typer.Option("--add-genes", help="Add genes that the model does not know.")] = False,
) -> Any:
    """Turn the options of the tasks into :class:`bgen.tasks.finetune.request.Request`."""
    from bgen.tasks.finetune.request import Request
    from bgen.tasks.perturb.screen import Columns

    return Request(
        task,
        mode,  # type: ignore[arg-type]
        label=label,
        columns=Columns(perturbation, control, dose, within or [], separator) if perturbation and control else None,
        add_genes=add_genes,
        hold_out=hold_out or [],
        time=time,
        system=within or [],
        network=network,
    )


@app.command()
@with_options(request=request_options, reading=cells_options)
def finetune(
    model: Annotated[Path, typer.Argument(help="Model directory: the parent.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder; the model is OUT/model.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as train.steps=500.")] = None,
    *,
    request: Any,
    reading: Any,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT from its newest checkpoint.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Adapt a model to your cells; the result is a model directory whose card names its parent.

    Example: `bgen finetune bgen-demo/model my.h5ad --task generate --out my-model`

    Example: `bgen finetune bgen-demo/model my.h5ad --task perturb --perturbation perturbation --control control
    --within cell_type --out my-model`

    Example: `bgen finetune bgen-demo/model course.h5ad --task time --time day --within donor --out my-course`
    """
    from bgen.distributed.world import compute_on, read_world
    from bgen.tasks.finetune.finetune import finetune as run

    say = _quiet if as_json else notes.print
    request = replace(request, **reading)
    compute_on(device)
    tuned = run(model, data, out, request, overrides=overrides or [], resume=resume, say=say)
    if not read_world().is_main:  # rank 0 reports for all
        return
    if as_json:
        about = tuned.model.about
        assert about.finetuning is not None, "it is what was just done"
        held_out = about.perturbation.held_out if about.perturbation else None
        told = {
            "model": str(out / "model"),
            "kind": tuned.model.kind,
            "parent": about.finetuning.parent.model_dump(),
            "held_out": held_out and held_out.model_dump(mode="json"),
        }
        typer.echo(json.dumps(told))
        return
    if tuned.scores is not None:
        results.print(tuned.scores.headline(), highlight=False)
        results.print(tuned.scores.table())
        for sentence in tuned.scores.sentences():
            results.print(sentence, highlight=False)
        results.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    results.print(f"Model: {out / 'model'}", highlight=False, soft_wrap=True)


@app.command()
def extend(
    model: Annotated[Path, typer.Argument(help="Model directory, of a model that knows genes by vectors.")],
    genes: Annotated[Path, typer.Option(help="New genes: .csv, .tsv or .txt (id, symbol), or cells, such as .h5ad.")],
    out: Annotated[Path, typer.Option(help="New model directory.")],
    vectors: Annotated[
        list[Path] | None, typer.Option(help="CSV or TSV of vectors like those of training; may be repeated.")
    ] = None,
    sets: Annotated[Path | None, typer.Option(help="Gene sets (.gmt) with the names of those of training.")] = None,
    orthologs: Annotated[
        Path | None, typer.Option(help="CSV or TSV: a new gene, and the gene whose vector it gets.")
    ] = None,
    gene_column: GeneColumn = None,
    as_json: Json = False,
) -> None:
    """Add genes that no training has seen, by what is known of them: their sets, vectors or orthologs.

    The model needs vectors of genes: vae.decoder={name: gene_table, vectors: ...}. Names that its sources knew need no
    files.

    Example: `bgen extend model --genes new.csv --out larger`

    Example: `bgen extend model --genes mouse.h5ad --orthologs mouse-human.tsv --out mouse-model`
    """
    from bgen.files import require_new_folder
    from bgen.hub.directory import load_directory, save_model
    from bgen.tasks.extend import extend_model

    require_new_folder(out)
    say = _quiet if as_json else notes.print
    extended = extend_model(
        load_directory(model),
        genes,
        vectors=vectors or [],
        sets=sets,
        orthologs=orthologs,
        gene_column=gene_column,
        say=say,
    )
    extended.about = extended.about.model_copy(update={"name": out.resolve().name})
    save_model(extended, out)
    if as_json:
        assert extended.about.extension is not None, "it is what was just done"
        told = {"model": str(out), "genes": len(extended.genes)}
        typer.echo(json.dumps({**told, "extension": extended.about.extension.model_dump(mode="json")}))
        return
    results.print(f"Model: {out}, {len(extended.genes):,} genes", highlight=False, soft_wrap=True)


def _quiet(_: str) -> None:
    """Say nothing."""
