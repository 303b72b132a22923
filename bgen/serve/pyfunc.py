"""A model directory behind ``mlflow models serve``: the questions and answers of ``bgen serve``, one in each row.

A row has the columns ``question`` ("generate", "embed", "annotate" or "perturb") and ``request``: the JSON that ``bgen
serve`` takes under that path. Its prediction is the JSON that ``bgen serve`` answers. MLflow imports this module (it is
the flavour's ``loader_module``), so nothing is pickled.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic.fields import FieldInfo

from bgen.errors import UserError
from bgen.hub.huggingface import WANTED
from bgen.serve.questions import OF_CELLS, Cells, Generate, Question, answer, schema
from bgen.tasks.load import Model, load_model
from bgen.track.pyfunc import Served, noted, refusal, require_unchanged

KINDS: dict[str, type[Question]] = {"generate": Generate, **{name: kind for name, (kind, _) in OF_CELLS.items()}}


class Answers:
    """What MLflow calls: a model that answers a table of questions."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the answer to each row's ``question`` with its ``request``.

        Raises
        ------
        mlflow.exceptions.MlflowException
            If a question is wrong: MLflow's server answers 400 with the sentence.
        """
        try:
            return [self._answer(row) for row in model_input.to_dict("records")]
        except UserError as error:
            raise refusal(str(error)) from None

    def _answer(self, row: dict[Any, Any]) -> dict[str, Any]:
        request = row.get("request")
        return answer(self.model, str(row["question"]), request if isinstance(request, dict) else {})


def _load_pyfunc(folder: str) -> Answers:
    """Load what MLflow has downloaded; it calls this by name."""
    known = noted(Path(folder))
    if known is not None:
        require_unchanged(Path(folder), known, WANTED, f"{folder} was changed since: register the model again.")
    return Answers(load_model(folder))


def _columns() -> list[dict[str, Any]]:
    """Return MLflow's schema of a question: all that one of any kind may say, each of it optional."""
    cells = {name: _typed(field) for name, field in Cells.model_fields.items()}
    cells |= {name: {**told, "required": Cells.model_fields[name].is_required()} for name, told in cells.items()}
    said: dict[str, Any] = {"cells": {"type": "object", "properties": cells, "required": False}}
    for kind in KINDS.values():
        said |= {name: {**_typed(field), "required": False} for name, field in kind.model_fields.items()}
    return [
        {"type": "string", "name": "question", "required": True},
        {"type": "object", "name": "request", "properties": said, "required": False},
    ]


def _typed(field: FieldInfo) -> dict[str, Any]:
    """Return MLflow's type of a field: "any" where numbers may be whole or not, which MLflow would refuse."""
    kind = field.annotation
    of = set(typing.get_args(kind)) - {type(None)} if typing.get_origin(kind) is not dict else set()
    only = next(iter(of)) if len(of) == 1 and typing.get_origin(kind) is not list else kind
    while typing.get_origin(only) is typing.Annotated:
        only = typing.get_args(only)[0]
    if only is int:
        return {"type": "long"}
    if only is str:
        return {"type": "string"}
    if only == list[str]:
        return {"type": "array", "items": {"type": "string"}}
    if typing.get_origin(only) is dict:
        return {"type": "map", "values": {"type": "any"}}
    return {"type": "any"}


SERVED = Served(
    loader=__name__,
    wanted=WANTED,
    inputs=_columns(),
    outputs=[
        {"type": "array", "items": {"type": "string"}, "name": "cells", "required": True},
        {"type": "map", "values": {"type": "any"}, "name": "obs", "required": True},
        {"type": "any", "name": "X_bgen", "required": False},
        {"type": "array", "items": {"type": "string"}, "name": "genes", "required": False},
        {"type": "any", "name": "counts", "required": False},
    ],
    questions={name: schema(kind, cells=name in OF_CELLS) for name, kind in KINDS.items()},
)
"""How MLflow serves any model directory."""
