"""Several perturbations in one call: a table of them in, one AnnData out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData

from bgen.errors import UserError, nearest
from bgen.progress import Progress
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.perturb.perturb import predict, prepare_controls, read_dose
from bgen.tasks.perturb.query import ask
from bgen.tasks.perturb.transport import times_of_perturbation
from bgen.tasks.user_cells import UserCells

COLUMNS = ("perturbation", "dose", "time")


def perturb_table(
    model: AnnDataModel,
    cells: UserCells,
    table: pd.DataFrame,
    *,
    control: tuple[str, str] | Literal["all"] | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AnnData:
    """Predict control cells under each row of a table, otherwise as :func:`bgen.tasks.perturb.perturb.perturb_cells`.

    Parameters
    ----------
    table
        Column ``perturbation``, and ``dose`` and ``time`` where the model needs them (empty: none).
    n
        Cells of each row; default: one for each control cell.

    Returns
    -------
    AnnData
        The cells of all rows, one after the other; ``query`` in obs is the number of the row, and
        ``uns['bgen']['queries']`` says of each what was unseen.

    Raises
    ------
    UserError
        If the table is empty or has other columns, or, with the number of the row, whatever one of them raises; all are
        looked at before anything is predicted.
    """
    queries = read_queries(table)
    controls, made = prepare_controls(model, cells, control), []
    for number, query in enumerate(queries):  # what is wrong with a row is said before anything is predicted
        with _row(number, query):
            ask(model, query["perturbation"], read_dose(model, query.get("dose")))
            times_of_perturbation(model.saved, query.get("time"))
    for number, query in enumerate(queries):
        with _row(number, query):
            part = predict(controls, n=n, seed=seed, **query)
        part.obs.insert(0, "query", number)
        part.obs_names = f"{number}_" + part.obs_names.astype(str)
        made.append(part)
        if progress:
            progress("predicting", number + 1, len(queries))
    joined = anndata.concat(made, merge="same")
    said = [part.uns["bgen"] for part in made]
    joined.uns["bgen"] = {
        **{key: said[0][key] for key in ("what", "model", "version", "seed", "precision")},
        "controls": controls.said,
        "queries": {
            str(number): {key: one[key] for key in ("perturbation", "dose", "unseen", "notes")}
            for number, one in enumerate(said)
        },
    }
    return joined


@contextmanager
def _row(number: int, query: dict[str, Any]) -> Iterator[None]:
    """Name the row in whatever is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"Row {number + 1} of the table ({query['perturbation']}): {error}") from error


def read_queries(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the keyword arguments that each row of a table stands for.

    Raises
    ------
    UserError
        If it is empty, or a column is missing or unknown.
    """
    if "perturbation" not in table or table.empty:
        raise UserError("A table of perturbations has a column 'perturbation' and at least one row.")
    for name in table.columns:
        if name not in COLUMNS:
            raise UserError(
                f"The table has a column '{name}'; known are {', '.join(COLUMNS)}.{nearest(str(name), COLUMNS)}"
            )
    queries: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        given: dict[str, Any] = {"perturbation": str(row["perturbation"])}
        for name in COLUMNS[1:]:
            value = row.get(name)
            if value is not None and not (isinstance(value, float) and np.isnan(value)) and value != "":
                given[name] = _number(name, value)
        queries.append(given)
    return queries


def _number(name: str, value: Any) -> Any:
    """Return a dose as it is given, a time as a number."""
    if name == "dose":
        return value if isinstance(value, str) else float(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"The table has a time '{value}', which is no number.") from None
