"""What a server is asked and what it answers, as JSON or AnnData, by the methods of the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bgen.errors import MOST_SEEDS, UserError, nearest
from bgen.models.generators.latent_flow import LatentFlow
from bgen.serve.pieces import plain
from bgen.tasks.generate import Ask, sample_settings
from bgen.tasks.generate import generate_together as generate_asks
from bgen.tasks.load import Model
from bgen.tasks.time.axis import trained_over_time

Seed = Annotated[int, Field(ge=0, le=MOST_SEEDS, description="The same seed gives the same answer.")]


class Question(BaseModel):
    """What every question may say of how cells are read."""

    model_config = ConfigDict(extra="forbid")


Asked = TypeVar("Asked", bound=Question)


class Sparse(Question):
    """A matrix of counts by rows: the non-zero entries of row i are those from ``indptr[i]`` to ``indptr[i + 1]``."""

    indptr: list[int]
    indices: list[int]
    data: list[float]


class Cells(Question):
    """Cells: counts of named genes, and columns about them."""

    genes: list[str] = Field(min_length=1, description="Ids or symbols, one for each column of the counts.")
    counts: Sparse | list[list[float]] = Field(description="Raw counts: by rows and columns, or sparse.")
    obs: dict[str, list[Any]] = Field(default_factory=dict, description="Columns: a value for each cell.")

    def adata(self) -> AnnData:
        """Return the cells.

        Raises
        ------
        UserError
            If sizes do not agree.
        """
        G = len(self.genes)
        try:
            if isinstance(self.counts, Sparse):
                parts = (self.counts.data, self.counts.indices, self.counts.indptr)
                counts = sp.csr_matrix(parts, shape=(len(self.counts.indptr) - 1, G), dtype=np.float32)
                counts.check_format(full_check=True)
            else:
                dense = np.asarray(self.counts, dtype=np.float32)
                if dense.ndim != 2 or dense.shape[1] != G:
                    raise ValueError(f"a row of counts has not {G} numbers, one for each gene")
                counts = sp.csr_matrix(dense)
        except (ValueError, OverflowError) as error:
            raise UserError(f"counts: {error}.") from None
        for name, values in self.obs.items():
            if len(values) != counts.shape[0]:
                raise UserError(f"obs '{name}' has {len(values)} values for {counts.shape[0]} cells.")
        index = pd.Index([f"cell{number}" for number in range(counts.shape[0])])
        obs = pd.DataFrame({name: pd.Series(values, index=index) for name, values in self.obs.items()}, index=index)
        return AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(self.genes)))


class Reading(Question):
    """How cells are read, as in every command that reads cells."""

    counts_in: str | None = Field(
        None, description='Matrix of raw counts in an .h5ad: "raw/X", "layers/counts", "auto".'
    )
    gene_column: str | None = Field(None, description="Column of var with the gene ids.")
    floor: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Least share of an average cell's molecules that the data's genes must have."
    )

    def options(self) -> dict[str, Any]:
        """Return what was given, as the model's methods call it."""
        given = {"counts": self.counts_in, "gene_column": self.gene_column, "floor": self.floor}
        return {name: value for name, value in given.items() if value is not None}


class Generate(Question):
    """New cells."""

    n: Annotated[int, Field(ge=1)] = Field(100, description="How many.")
    where: dict[str, str | float] = Field(default_factory=dict, description="Conditions: column to value.")
    library_size: Annotated[float, Field(gt=0)] | None = Field(None, description="Total counts of a cell.")
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None
    seed: Seed = 0


class Embed(Reading):
    """The latent states of cells."""


class Annotate(Reading):
    """Labels of cells."""

    label: str | None = Field(None, description="obs column of some labels to learn from; none: the model's own.")
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5


class Perturb(Reading):
    """Control cells under a perturbation."""

    perturbation: str = Field(min_length=1, description="A name, or several with + between them.")
    control_column: str | None = Field(None, description="obs column that says which cells are controls.")
    control: str | None = Field(None, description="Its value for them; 'all', without a column: all cells are.")
    dose: float | None = None
    time: float | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _control_is_whole(self) -> Perturb:
        if self.control_column is not None and self.control is None:
            raise ValueError("control_column needs control: its value for control cells")
        if self.control_column is None and self.control not in (None, "all"):
            raise ValueError("control needs control_column, unless it is 'all'")
        return self


def generate(model: Model, asked: Generate) -> AnnData:
    """Answer :class:`Generate`."""
    return model.generate(
        asked.n, where=asked.where, library_size=asked.library_size, guidance=asked.guidance, seed=asked.seed
    )


def embed(model: Model, cells: AnnData, asked: Embed) -> AnnData:
    """Answer :class:`Embed`."""
    return model.embed(cells, **asked.options())


def annotate(model: Model, cells: AnnData, asked: Annotate) -> AnnData:
    """Answer :class:`Annotate`."""
    return model.annotate(cells, asked.label, threshold=asked.threshold, **asked.options())


def perturb(model: Model, cells: AnnData, asked: Perturb) -> AnnData:
    """Answer :class:`Perturb`."""
    control: tuple[str, str] | Literal["all"] | None = None
    if asked.control_column is not None and asked.control is not None:
        control = (asked.control_column, asked.control)
    elif asked.control == "all":
        control = "all"
    return model.perturb(
        cells,
        asked.perturbation,
        control=control,
        dose=asked.dose,
        time=asked.time,
        n=asked.n,
        seed=asked.seed,
        **asked.options(),
    )


def validated(kind: type[Asked], tree: Any) -> Asked:
    """Return a question of a kind, from plain values.

    Raises
    ------
    UserError
        If it is none; names the first five mistakes.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[:5]
        said = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the request'}: {one['msg']}" for one in first)
        raise UserError(said) from None


def schema(kind: type[Question], *, cells: bool) -> dict[str, Any]:
    """Return the JSON Schema of a question; ``cells``: of one that brings cells."""
    told = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    told.pop("$defs", None)
    if cells:
        known = Cells.model_json_schema(ref_template="#/components/schemas/{model}")
        told["properties"] = {"cells": {k: v for k, v in known.items() if k != "$defs"}, **told["properties"]}
    return told


def kind_of_generate(model: Model, asked: Generate) -> Hashable | None:
    """Return what questions have in common that :func:`generate_together` answers; None: this one is answered alone."""
    if model.saved.sample.solver == "adaptive" or trained_over_time(model.saved):
        return None
    return "generate", asked.guidance, asked.library_size is None


def generate_together(model: Model, asked: Sequence[Generate]) -> list[AnnData]:
    """Answer several :class:`Generate` of one kind: the cells are those that each gets alone."""
    settings = sample_settings(model.saved.sample, guidance=asked[0].guidance)
    return generate_asks(
        model.saved, [Ask(each.n, each.where, each.library_size, each.seed) for each in asked], settings
    )


def kind_of_embed(model: Model, cells: AnnData, asked: Embed) -> Hashable | None:
    """Return what questions have in common that :func:`embed_together` answers; None: this one is answered alone.

    Whatever a reader judges by all the values that it sees sends cells home: values that are no counts, columns of
    numbers, cells without a count.
    """
    numbers = {name for name, info in model.saved.columns.items() if info.kind == "number"}
    numbers |= {model.saved.columns[name].role for name in numbers}
    texts = all(pd.api.types.infer_dtype(column, skipna=False) == "string" for _, column in cells.obs.items())
    values = cells.X.data
    plain = len(values) > 0 and bool((values >= 0).all() and (values == np.rint(values)).all())
    if not plain or not texts or numbers & set(cells.obs):
        return None
    return "embed", tuple(cells.var_names), tuple(cells.obs), tuple(asked.options().items())


def embed_together(model: Model, asked: Sequence[tuple[AnnData, Embed]]) -> list[AnnData]:
    """Answer several :class:`Embed` of one kind, whose cells are read and encoded at once.

    Raises
    ------
    UserError
        If somebody's cells cannot be read, or have no count of a gene that the model knows.
    """
    parts = [cells for cells, _ in asked]
    obs = pd.concat([cells.obs for cells in parts], ignore_index=True)
    obs.index = obs.index.astype(str)
    joined = AnnData(sp.vstack([cells.X for cells in parts], format="csr"), obs=obs, var=parts[0].var)
    read = model.read(joined, **asked[0][1].options())
    embedded = model.embed(read)
    answers, first = [], 0
    for cells in parts:
        part = slice(first, first + cells.n_obs)
        if not read.counts[part].nnz:
            raise UserError("Some of these cells have no count of a gene that the model knows.")
        answer = cells.copy()
        answer.obsm["X_bgen"] = embedded.obsm["X_bgen"][part]
        answer.uns["bgen"] = dict(embedded.uns["bgen"])
        answers.append(answer)
        first = part.stop
    return answers


OF_CELLS: dict[str, tuple[type[Reading], Callable[..., AnnData]]] = {
    "embed": (Embed, embed),
    "annotate": (Annotate, annotate),
    "perturb": (Perturb, perturb),
}
"""Questions about cells: what each may say, and what answers it."""

WITH_COUNTS = ("generate", "perturb")
"""Questions whose answers are new counts."""


def answer(model: Model, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a question, "generate" or one of :data:`OF_CELLS`, that is given as plain values.

    Raises
    ------
    UserError
        If there is no such question, it is malformed, or the model cannot answer it.
    """
    if name == "generate":
        return as_json(generate(model, validated(Generate, tree)), counts=True)
    if name not in OF_CELLS:
        known = ["generate", *OF_CELLS]
        raise UserError(f"There is no question '{name}'; there are {', '.join(known)}.{nearest(name, known)}")
    kind, method = OF_CELLS[name]
    cells = validated(Cells, tree.get("cells"))
    asked = validated(kind, {key: value for key, value in tree.items() if key != "cells"})
    return as_json(method(model, cells.adata(), asked), counts=name in WITH_COUNTS)


def as_json(adata: AnnData, *, counts: bool) -> dict[str, Any]:
    """Return an answer as plain values; see :func:`answer_of`."""
    told: dict[str, Any] = plain(answer_of(adata, counts=counts))
    return told


def answer_of(adata: AnnData, *, counts: bool) -> dict[str, Any]:
    """Return an answer as plain values and arrays: columns of obs, latent states, and, if asked for, counts."""
    obs: dict[str, list[Any]] = {}
    for name, column in adata.obs.items():
        values = column.astype(object).where(column.notna(), None)
        obs[str(name)] = [value.item() if isinstance(value, np.generic) else value for value in values]
    told: dict[str, Any] = {"cells": adata.obs_names.tolist(), "obs": obs}
    if "X_bgen" in adata.obsm:
        told["X_bgen"] = np.asarray(adata.obsm["X_bgen"], float).round(6)
    if counts:
        matrix = sp.csr_matrix(adata.X)
        told["genes"] = adata.var_names.tolist()
        told["counts"] = {"indptr": matrix.indptr, "indices": matrix.indices, "data": matrix.data}
    return told


def facts(model: Model) -> dict[str, Any]:
    """Return what a model is and can be asked for."""
    saved = model.saved
    sets = saved.module.conditions.set_names if isinstance(saved.module, LatentFlow) else []
    return {
        "name": saved.about.name,
        "kind": saved.kind,
        "organism": saved.about.organism,
        "genes": len(model.genes),
        "conditions": model.conditions,
        "perturbations": [name for column in sets for name in saved.columns[column].categories],
        "fingerprint": saved.fingerprint(),
    }
