"""The command line's verbs over time. Heavy imports stand inside them, so ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bgen.cli.options import Data, Device, Precision, cells_options, read_cells, with_options
from bgen.cli.terminal import Json, Seed, notes, parse_scales, parse_where, progress_bar, results
from bgen.errors import MOST_CELLS, MOST_COUNTS
from bgen.files import require_new_h5ad, write_h5ad

app = typer.Typer(help="What a model does over time.")

ModelFolder = Annotated[Path, typer.Argument(help="Model directory, of a flow trained on trajectories over time.")]
Times = Annotated[
    list[float], typer.Option("--time", min=-1e9, max=1e9, help="Time asked for, in the model's unit; may be repeated.")
]
Out = Annotated[Path, typer.Option(help="The .h5ad to write.")]
Cells = Annotated[
    int | None, typer.Option("--n", min=1, max=MOST_CELLS, help="Cells per time; default: as many as there are.")
]
Where = Annotated[list[str] | None, typer.Option(help="Only such cells, column=value; may be repeated.")]
Library = Annotated[
    float | None, typer.Option(min=1, max=MOST_COUNTS, help="Total counts per cell; default: generated.")
]
Guidance = Annotated[float | None, typer.Option(min=0, max=1000, help="Guidance scale; 1 is the conditional model.")]
GuidanceOf = Annotated[
    list[str] | None, typer.Option(help="Guidance scale of one condition, column=scale; may be repeated.")
]
Steps = Annotated[int | None, typer.Option(min=1, max=10_000, help="Solver steps.")]
Solver = Annotated[str | None, typer.Option(help="euler, heun, midpoint or adaptive.")]
TimeColumn = Annotated[str | None, typer.Option(help="obs column of the times; default: as the model knows it.")]


def _predictor(name: str, forecast: bool, text: str) -> None:
    """Add a verb that predicts time points; ``text`` says what it does."""

    def predict(
        model: ModelFolder,
        data: Data,
        time: Times,
        out: Out,
        n: Cells = None,
        where: Where = None,
        library_size: Library = None,
        guidance: Guidance = None,
        guidance_of: GuidanceOf = None,
        steps: Steps = None,
        solver: Solver = None,
        time_column: TimeColumn = None,
        *,
        reading: Any,
        seed: Seed = 0,
        device: Device = "auto",
        precision: Precision = "float32",
        as_json: Json = False,
    ) -> None:
        from bgen.tasks.load import load_model

        require_new_h5ad(out)
        loaded = load_model(model, device, precision=precision)
        with progress_bar() as progress:
            read = read_cells(loaded, data, reading, as_json)
            cells, scores = loaded.predict_times(
                read,
                time,
                forecast=forecast,
                n=n,
                where=parse_where(where or []),
                library_size=library_size,
                sample={
                    "guidance": guidance,
                    "guidance_of": parse_scales(guidance_of),
                    "steps": steps,
                    "solver": solver,
                },
                time_column=time_column,
                seed=seed,
                progress=progress,
            )
        write_h5ad(cells, out)
        if as_json:
            found = {f"{moment:g}": score.as_json() for moment, score in scores.items()}
            told = {"out": str(out), "cells": cells.n_obs, "genes": cells.n_vars, "matched": read.matched.as_json()}
            typer.echo(json.dumps({**told, "scores": found}))
            return
        for score in scores.values():
            results.print(f"Time {score.setting['time']:g}:")
            results.print(score.table())
            if score.setting["time_was_in_training"] == "True":
                notes.print("The model was trained on cells of this time: the score says how well it remembers.")
        if not scores:
            results.print("No score: the data hold too few cells of that time to compare with.")
        results.print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes: {out}")

    predict.__doc__ = text
    app.command(name)(with_options(reading=cells_options)(predict))


_predictor(
    "interpolate",
    False,
    """Generate a missing time point from the time points around it; scored where your data do hold it.

    Cells that the data hold at that time are not shown to the model. The score means something only if the model was
    not trained on that time either.

    Example: `bgen interpolate model cells.h5ad --time 36 --out at36.h5ad`
    """,
)
_predictor(
    "forecast",
    True,
    """Generate a later time point from the time points before it; scored where your data do hold it.

    Example: `bgen forecast model cells.h5ad --time 48 --out at48.h5ad`
    """,
)
