"""``bgen finetune``. Heavy imports stand inside the verb, so ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bgen.cli.terminal import Json, notes, results
from bgen.errors import UserError

app = typer.Typer(help="Adapt a model to your cells.")

TASKS = ("generate", "annotate", "perturb", "time")
MODES = ("full", "lora", "head")


@app.command()
def finetune(
    model: Annotated[Path, typer.Argument(help="Model directory: the parent.")],
    data: Annotated[Path, typer.Argument(help="The .h5ad with your cells: raw counts.")],
    task: Annotated[str, typer.Option(help="generate, annotate, perturb or time.")],
    out: Annotated[Path, typer.Option(help="New folder; the model is OUT/model.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as train.steps=500.")] = None,
    mode: Annotated[str, typer.Option(help="full, lora or head: how much is trained.")] = "full",
    label: Annotated[str | None, typer.Option(help="annotate: obs column of labels.")] = None,
    perturbation: Annotated[str | None, typer.Option(help="perturb: obs column that names the perturbation.")] = None,
    control: Annotated[str | None, typer.Option(help="perturb: its value for control cells.")] = None,
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
    floor: Annotated[float, typer.Option(min=0, max=1, help="Least share of the model's genes in the data.")] = 0.8,
    layer: Annotated[str | None, typer.Option(help="Layer with the raw counts; default: X.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT from its newest checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Adapt a model to your cells; the result is a model directory whose card names its parent.

    Example: `bgen finetune bgen-demo/model my.h5ad --task generate --out my-model`

    Example: `bgen finetune bgen-demo/model my.h5ad --task perturb --perturbation perturbation --control control
    --within cell_type --out my-model`

    Example: `bgen finetune bgen-demo/model course.h5ad --task time --time day --within donor --out my-course`
    """
    from bgen.distributed.world import read_world
    from bgen.tasks.finetune.finetune import Request
    from bgen.tasks.finetune.finetune import finetune as run
    from bgen.tasks.perturb.screen import Columns
    from bgen.tasks.user_cells import read_h5ad

    if task not in TASKS or mode not in MODES:
        raise UserError(f"--task is one of {', '.join(TASKS)} and --mode one of {', '.join(MODES)}.")
    if task == "perturb" and (perturbation is None or control is None):
        raise UserError("--task perturb needs --perturbation (an obs column) and --control (its value for controls).")
    if network is not None and task != "perturb":
        raise UserError(f"--network is about unseen targets of --task perturb, not of --task {task}: leave it out.")
    if task == "annotate" and label is None:
        raise UserError("--task annotate needs --label, the obs column with the labels.")
    columns = Columns(perturbation, control, dose, within or []) if perturbation and control else None
    request = Request(
        task,  # type: ignore[arg-type]
        mode,  # type: ignore[arg-type]
        label,
        columns,
        layer,
        add_genes,
        floor,
        hold_out or [],
        time,
        within or [],
        network,
    )
    say = _quiet if as_json else notes.print
    tuned = run(model, read_h5ad(data), out, request, overrides=overrides or [], resume=resume, say=say)
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
        results.print(tuned.scores.table())
        for sentence in tuned.scores.sentences():
            results.print(sentence, highlight=False)
        results.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    results.print(f"Model: {out / 'model'}", highlight=False, soft_wrap=True)


def _quiet(_: str) -> None:
    """Say nothing."""
