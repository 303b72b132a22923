"""What a model directory says of its model besides weights, genes and columns: the typed record ``about`` in
config.json.

The record has a version. Version 1 had no groups and no number: its fields stood side by side, and :func:`read_about`
sorts them into groups. A field that an older version did not have gets its default; a field that this bgen does not
know is refused, since a newer one wrote it and may rely on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from bgen.config.data import TrajectoriesConfig
from bgen.config.section import Section
from bgen.errors import UserError
from bgen.version import __version__

VERSION = 2


class Training(Section):
    """The run of ``bgen train`` that made the model."""

    store: str = Field(description="Fingerprint of the store.")
    split: str = Field(description="Split that was trained on.")
    steps: int = Field(description="Optimiser steps done.")
    seed: int


class Parent(Section):
    """The model that was fine-tuned."""

    name: str
    fingerprint: str = Field(description="SHA-256 of its weights.")


class Finetuning(Section):
    """The run of ``bgen finetune`` that made the model."""

    task: str
    mode: str
    parent: Parent


class Extension(Section):
    """Genes that were added to the model without training (``source`` in genes.csv)."""

    genes: int = Field(description="Genes that were added.")
    ways: dict[str, int] = Field(description="How their vectors were found, and how many in each way.")
    trained_genes: int = Field(description="Genes of the training that have a vector.")
    level_r2: float = Field(description="Share of the variance of their levels that vectors tell of left-out ones.")
    parent: Parent = Field(description="The model without them.")


class Annotation(Section):
    """What an annotator tells."""

    label: str = Field(description="obs column of the labels that it learned from.")
    labels: list[str] = Field(description="Names in the order of the classes.")


class EffectOf(Section):
    """What an average effect is of; the effects themselves are weights, in the same order."""

    set: list[str] = Field(description="Perturbations, sorted.")
    dose: float | None = Field(description="null: none.")


class EffectPooling(Section):
    """How average effects are pooled over contexts and joined with the flow's answer
    (:mod:`bgen.effects.effects`).
    """

    width: float | None = Field(None, description="Over which contexts are alike; null: all are.")
    bilinear: float = Field(0.0, description="Share of the bilinear form in control cells, for unseen contexts.")
    features: int = Field(0, description="Features of control cells that it sees.")
    directions: int = Field(0, description="Directions by which it tells perturbations apart.")
    flow: float = Field(0.5, description="Share of the flow's own answer, at most.")
    unseen_error: float | None = Field(
        None,
        description="Squared error in left-out contexts, in units of squares of effects; null: unknown.",
    )
    pairs: float = Field(1.0, description="Effect of an unseen combination in units of the sum of its members'.")
    knock_down: float | None = Field(
        None, description="Natural log of the fold of targets of their own perturbation; null: none was measured."
    )


class RegulatoryNetwork(Section):
    """The regulatory network that unseen targets are predicted with."""

    components: int = Field(description="Size of a gene's row.")
    edges: int = Field(description="Edges between genes of the model.")
    edges_in_file: int


class HeldOutFigure(Section):
    """One figure of one row, over held-out perturbations and seeds; null where it is not defined."""

    mean: float | None
    interval: tuple[float | None, float | None] = Field(description="95 % interval of the mean.")
    by_seed: list[float | None]
    by_perturbation: list[float | None]


class HeldOutScores(Section):
    """How well perturbations were predicted that were held out."""

    protocol: str
    perturbations: list[str]
    rows: dict[str, dict[str, HeldOutFigure]] = Field(description="Model, baselines and ceiling to metric to figure.")
    words: list[str] = Field(description="The same in sentences.")
    headline: str = Field("", description='The same in one sentence; "": of a protocol up to perturbation-v3.')


class Perturbation(Section):
    """What a perturbation model was trained on and how its effects are used."""

    perturbations: list[str] = Field(description="Names in the order of the embeddings.")
    strata: list[str] = Field(default_factory=list, description="obs columns within which cells were compared.")
    column: str | None = Field(None, description="obs column of the labels.")
    controls: list[str] = Field(default_factory=list, description="Labels of control cells, where there are several.")
    separator: str = Field("+", description="Between the names of a label.")
    named: list[str] = Field(
        default_factory=list, description="Names with a vector beside the model's genes, in the order of their rows."
    )
    effects: list[EffectOf] = Field(default_factory=list)
    contexts: list[list[str]] = Field(
        default_factory=list, description="Values of the strata in contexts with control and perturbed cells."
    )
    own: int = Field(0, description="Effects in contexts that were measured.")
    pooling: EffectPooling = EffectPooling()
    network: RegulatoryNetwork | None = None
    held_out: HeldOutScores | None = None


class About(Section):
    """What a model directory says of its model."""

    version: int = VERSION
    name: str
    organism: str
    units: dict[str, str] = Field(default_factory=dict, description="Unit of time and of dose.")
    roles: dict[str, str] = Field(default_factory=dict, description="Role to obs column of the training cells.")
    control: str | None = Field(None, description="The perturbation that means none.")
    sources: list[str] = Field(default_factory=list, description="Where the training cells come from.")
    cells: int = Field(0, description="Training cells.")
    times: list[float] = Field(default_factory=list, description="Distinct times of the training cells, ascending.")
    trajectories: TrajectoriesConfig | None = Field(None, description="null: trained on single cells.")
    training: Training | None = None
    finetuning: Finetuning | None = None
    annotation: Annotation | None = None
    perturbation: Perturbation | None = None
    extension: Extension | None = Field(None, description="null: all genes were trained on.")

    def as_json(self) -> dict[str, Any]:
        """Return what is said as plain JSON values, without what was left open."""
        said = self.model_dump(mode="json", exclude_unset=True)
        if self.trajectories is not None:  # all of it, whether it was set or is a default
            said["trajectories"] = self.trajectories.model_dump(mode="json")
        return {"version": VERSION, **said}


GROUPS: dict[str, type[BaseModel]] = {
    "training": Training,
    "finetuning": Finetuning,
    "annotation": Annotation,
    "perturbation": Perturbation,
}
"""Groups of fields that stood side by side in version 1."""


def read_about(tree: Mapping[str, Any], file: Path) -> About:
    """Read what ``file``, a config.json, says of its model.

    Raises
    ------
    UserError
        If a newer bgen wrote it, or something is missing or wrong.
    """
    newer = f"A newer bgen wrote {file}; this one is {__version__}. Upgrade it to use the model."
    version = tree.get("version", 1)
    if version not in range(1, VERSION + 1):
        raise UserError(f"about.version is {version}, and this bgen knows those up to {VERSION}. {newer}")
    try:
        return About.model_validate({**(_grouped(tree) if version == 1 else tree), "version": VERSION})
    except ValidationError as error:
        found = {item["type"]: "about." + ".".join(map(str, item["loc"])) for item in reversed(error.errors())}
        if "extra_forbidden" in found:
            raise UserError(f"{found['extra_forbidden']} is nothing that this bgen knows. {newer}") from None
        kind, place = next(iter(found.items()))
        what = "is missing" if kind == "missing" else "is wrong"
        raise UserError(f"{file} is damaged: {place} {what}. Export the model again.") from None


def _grouped(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of version 1 in groups."""
    tree = dict(flat)
    for name, group in GROUPS.items():
        members = {field: tree.pop(field) for field in group.model_fields if field in tree}
        if members:
            tree[name] = members
    return tree
