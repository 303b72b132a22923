"""``bgen perturb``. Heavy imports stand inside the verb, so ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bgen.cli.options import Data, Device, Precision, cells_options, read_cells, with_options
from bgen.cli.terminal import Json, Seed, notes, parse_where, progress_bar, results
from bgen.errors import MOST_CELLS, UserError
from bgen.files import require_new_file, require_new_h5ad, write_h5ad, write_result
from bgen.names import shown

app = typer.Typer(help="Perturbations.")

Control = Annotated[
    str | None, typer.Option(help="Which cells are controls, column=value, or all; default: as the model knows.")
]
Dose = Annotated[str | None, typer.Option(help="In the model's unit, or with one, such as '10 uM'.")]
Time = Annotated[
    float | None,
    typer.Option(min=-1e9, max=1e9, help="Since the perturbation, for a model of time courses, in its unit."),
]


@app.command()
@with_options(reading=cells_options)
def perturb(
    model: Annotated[Path, typer.Argument(help="Model that has seen perturbations.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="The .h5ad to write.")],
    perturbation: Annotated[str | None, typer.Option(help="Gene or drug, or several joined by '+'.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV with a perturbation in each row: perturbation, dose, time.")
    ] = None,
    control: Control = None,
    dose: Dose = None,
    time: Time = None,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, max=MOST_CELLS, help="Cells of each perturbation; default: one per control."),
    ] = None,
    *,
    reading: Any,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Predict what your control cells would look like under a perturbation, or each of a table, as counts.

    Example: `bgen perturb my-model/model my.h5ad --control perturbation=control --perturbation G0012 --out cells.h5ad`

    Example: `bgen perturb my-model/model my.h5ad --table perturbations.csv --out cells.h5ad`
    """
    from bgen.tasks.load import load_model

    require_new_h5ad(out)
    asked = _asked(perturbation, table)
    if table is not None and (dose is not None or time is not None):
        raise UserError("--dose and --time are columns of the --table.")
    with progress_bar() as progress:
        loaded = load_model(model, device, precision=precision)
        read = read_cells(loaded, data, reading, as_json)
        cells = loaded.perturb(
            read, asked, control=_controls(control), dose=dose, time=time, n=n, seed=seed, progress=progress
        )
    write_h5ad(cells, out)
    said = cells.uns["bgen"]
    queries = list(said["queries"].values()) if table is not None else [said]
    unseen = list(dict.fromkeys(name for query in queries for name in query["unseen"]))
    far = list(dict.fromkeys(str(note) for query in queries for note in query["notes"]))
    if as_json:
        told = {"out": str(out), "cells": cells.n_obs, "genes": cells.n_vars, "matched": read.matched.as_json()}
        typer.echo(json.dumps({**told, "unseen": unseen, "notes": far, "controls": str(said["controls"])}))
        return
    notes.print(f"Controls: {said['controls']}.")
    for note in far:
        results.print(note, highlight=False)
    if unseen:
        results.print(
            "Predictions of what was never seen are often no better than the average perturbation: check them.",
            highlight=False,
        )
    results.print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes: {out}", highlight=False, soft_wrap=True)


@app.command()
@with_options(reading=cells_options)
def screen(
    model: Annotated[Path, typer.Argument(help="Model that has seen perturbations.")],
    data: Data,
    towards: Annotated[str, typer.Option(help="The cells to move towards, column=value.")],
    out: Annotated[Path, typer.Option(help="The .csv to write.")],
    rank: Annotated[
        list[str] | None,
        typer.Option(help="A perturbation to rank; may be repeated; default: all that the model was trained on."),
    ] = None,
    control: Control = None,
    dose: Dose = None,
    time: Time = None,
    *,
    reading: Any,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Rank perturbations by how far they would move your control cells towards other cells of yours.

    Example: `bgen screen my-model/model my.h5ad --towards cell_type=B --control perturbation=control --out ranked.csv`
    """
    from bgen.tasks.load import load_model

    require_new_file(out)
    (target,) = parse_where([towards]).items()
    with progress_bar() as progress:
        loaded = load_model(model, device, precision=precision)
        read = read_cells(loaded, data, reading, as_json)
        found = loaded.screen(
            read,
            target,
            perturbations=rank,
            control=_controls(control),
            dose=dose,
            time=time,
            seed=seed,
            progress=progress,
        )
    write_result(out, found.to_csv(index=False))
    if as_json:
        typer.echo(json.dumps({"out": str(out), "ranked": json.loads(found.to_json(orient="records"))}))
        return
    for row in found.head(10).itertuples():
        far = "" if row.seen else " (not trained on as it stands)"
        results.print(f"{shown(row.perturbation)}: {row.nearer:.0%} of the way{far}", highlight=False)
    results.print(f"{len(found):,} perturbations: {out}", highlight=False, soft_wrap=True)


def _asked(perturbation: str | None, table: Path | None) -> Any:
    if (perturbation is None) == (table is None):
        raise UserError("Give --perturbation, or --table with several; one of the two.")
    if table is None:
        return perturbation
    import pandas as pd

    try:
        return pd.read_csv(table, dtype={"perturbation": str, "dose": str})
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{table} cannot be read: {str(error)[:200]}") from None


def _controls(control: str | None) -> Any:
    return control if control in (None, "all") else next(iter(parse_where([control]).items()))
