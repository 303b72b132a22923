"""``bgen perturb``. Heavy imports stand inside the verb, so ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bgen.cli.options import Data, cells_options, read_cells, with_options
from bgen.cli.terminal import Json, Seed, notes, parse_where, progress_bar, results
from bgen.errors import MOST_CELLS
from bgen.files import require_new_file, write_h5ad

app = typer.Typer(help="Perturbations.")


@app.command()
@with_options(reading=cells_options)
def perturb(
    model: Annotated[Path, typer.Argument(help="Model directory, of `bgen finetune --task perturb`.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="The .h5ad to write.")],
    perturbation: Annotated[str, typer.Option(help="Gene or drug, or several joined by '+'.")],
    control: Annotated[
        str | None, typer.Option(help="Which cells are controls, column=value, or all; default: as the model knows.")
    ] = None,
    dose: Annotated[str | None, typer.Option(help="In the model's unit, or with one, such as '10 uM'.")] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, max=MOST_CELLS, help="Cells to predict; default: one per control.")
    ] = None,
    *,
    reading: Any,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict what your control cells would look like under a perturbation, as counts.

    Example: `bgen perturb my-model/model my.h5ad --control perturbation=control --perturbation G0012 --out cells.h5ad`
    """
    from bgen.tasks.load import load_model

    require_new_file(out)
    where: Any = control if control in (None, "all") else next(iter(parse_where([control]).items()))
    with progress_bar() as progress:
        loaded = load_model(model)
        read = read_cells(loaded, data, reading, as_json)
        cells = loaded.perturb(read, perturbation, control=where, dose=dose, n=n, seed=seed, progress=progress)
    write_h5ad(cells, out)
    unseen, controls = list(cells.uns["bgen"]["unseen"]), str(cells.uns["bgen"]["controls"])
    if as_json:
        told = {"out": str(out), "cells": cells.n_obs, "genes": cells.n_vars, "matched": read.matched.as_json()}
        typer.echo(json.dumps({**told, "unseen": unseen, "controls": controls}))
        return
    notes.print(f"Controls: {controls}.")
    if unseen:
        results.print(
            f"Not in training, predicted from what is known of the gene alone: {', '.join(unseen)}. Such"
            " predictions are often no better than the average perturbation: check them.",
            highlight=False,
        )
    results.print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes: {out}", highlight=False, soft_wrap=True)
