"""What a user asks of a model of perturbations, in the model's terms, and how far from training it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bgen.arrays import F64
from bgen.effects.effects import Effects, Known
from bgen.errors import UserError, nearest
from bgen.genes.vectors import find_vectors
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.generators.members import Members
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.perturb.transport import facts_of, member_embedding
from data_tools.check.labels import JOIN, WHOLE, Grammar


@dataclass(frozen=True)
class Query:
    """A set of perturbations with their dose.

    Attributes
    ----------
    names
        Its members, sorted.
    members
        The same for the flow, ``[1, K]``.
    dose
        In the model's unit; None: given without.
    unseen
        Members that were not trained on.
    effects
        Average effects that tell of it; None: the flow alone does.
    known
        What is known of its members, and of trained ones, by name.
    notes
        Sentences that say how far from training it is; none where it was trained on as it stands.
    """

    names: list[str]
    members: Members
    dose: float | None
    unseen: list[str]
    effects: Effects | None
    known: Known
    notes: list[str]


def members_of(model: AnnDataModel, perturbation: str | Sequence[str]) -> list[str]:
    """Return the members of a label, or of a list, sorted.

    Raises
    ------
    UserError
        If there are none.
    """
    facts, vectors = facts_of(model.saved), member_embedding(model.saved).vectors.cpu().numpy()
    if isinstance(perturbation, str):
        controls = facts.controls or ([model.saved.about.control] if model.saved.about.control else [])
        is_one = perturbation in facts.perturbations
        is_one = is_one or find_vectors(model.saved.genes, facts.named, vectors, [perturbation])[0] >= 0
        grammar = Grammar(tuple(controls), WHOLE if is_one else facts.separator)
        parts = [] if grammar.is_control(perturbation) else list(grammar.members(perturbation))
    else:
        parts = sorted(set(perturbation))
    if not parts:
        raise UserError(
            f"'{perturbation}' is no perturbation: name a gene or a drug, or several joined by '{facts.separator}'."
        )
    return parts


def ask(model: AnnDataModel, perturbation: str | Sequence[str], dose: float | None = None) -> Query:
    """Return what a label, or a list of members, means to a model.

    Raises
    ------
    UserError
        If nothing is known of a member, or the dose is missing or wrong.
    """
    embedding, facts, genes = member_embedding(model.saved), facts_of(model.saved), model.saved.genes
    names, vectors = facts.perturbations, embedding.vectors.cpu().numpy()
    parts = members_of(model, perturbation)
    rows = find_vectors(genes, facts.named, vectors, parts)
    unseen = [part for part in parts if part not in names]
    for part, row in zip(parts, rows, strict=True):
        if part in unseen and row < 0:
            known = [*names, *model.genes, *facts.named]
            missing = "has no vector for it" if part in known else "no gene or vector of that name"
            raise UserError(
                f"The model knows no perturbation '{part}', and {missing}."
                f"{'' if part in known else nearest(part, known)} It was trained on {', '.join(names[:8])}"
                f"{', ...' if len(names) > 8 else ''}."
            )
    doses = trained_doses(model.saved, parts)
    if dose is not None and embedding.sizes.amount is None:
        raise UserError("The model was trained without doses: leave --dose out.")
    if dose is None and doses:
        raise UserError(f"Give --dose: the model was trained at {', '.join(f'{d:g}' for d in doses)}.")
    place = {name: number for number, name in enumerate(names)}
    K = len(parts)
    members = Members(
        own=torch.tensor([[place.get(part, -1) for part in parts]]),
        vector=torch.from_numpy(rows)[None],
        amount=torch.full((1, K), torch.nan if dose is None else dose),
        there=torch.ones(1, K, dtype=torch.bool),
        told=torch.ones(1, dtype=torch.bool),
    )
    notes = [
        _of_unseen(part, row, names, find_vectors(genes, facts.named, vectors, names), vectors)
        for part, row in zip(parts, rows, strict=True)
        if part in unseen
    ]
    notes += _of_sets(model.saved, parts, unseen) + _of_dose(doses, dose)
    averages = model.saved.module.averages if isinstance(model.saved.module, LatentFlow) else None
    effects = None if averages is None else Effects.of_tables(averages, facts.effects, facts.pooling)
    every = [*names, *unseen]
    network = None if averages is None or not len(averages.network) else averages.network.cpu().numpy()
    by_name = Known.of_vectors(genes, every, find_vectors(genes, facts.named, vectors, every), vectors, network)
    return Query(parts, members, dose, unseen, effects, by_name, notes)


def trained_sets(model: SavedModel) -> list[list[str]]:
    """Return the members of every label that the model knows, in the order of codes."""
    facts = facts_of(model)
    own = member_embedding(model).label_own.tolist()
    return [[facts.perturbations[at] for at in row if at >= 0] for row in own]


def trained_doses(model: SavedModel, parts: Sequence[str] = ()) -> list[float]:
    """Return the doses of training, ascending, of labels that hold one of ``parts``; of all, if none does."""
    embedding, table, flow = member_embedding(model), model.combinations, model.module
    assert isinstance(flow, LatentFlow)
    column, amount = flow.conditions.set_names[0], embedding.sizes.amount
    if amount is None or amount not in table or column not in table:
        return []
    sets, codes = trained_sets(model), table[column].to_numpy(np.int64)
    doses = table[amount].to_numpy(np.float64)
    perturbed = np.array([code >= 0 and bool(sets[code]) for code in codes]) & np.isfinite(doses)
    own = np.array([code >= 0 and bool({*sets[code]} & {*parts}) for code in codes])
    return sorted({float(dose) for dose in doses[perturbed & (own if (own & perturbed).any() else perturbed)]})


def _of_unseen(part: str, row: int, names: list[str], rows: np.ndarray, vectors: np.ndarray) -> str:
    """Say of a member that was not trained on which trained one is most like it."""
    there = rows >= 0
    if not there.any():
        return f"'{part}' was not trained on, and nothing is known by name of those that were."
    known: F64 = vectors[rows[there]].astype(np.float64)
    at = vectors[row].astype(np.float64)
    cosine = known @ at / np.maximum(np.linalg.norm(known, axis=1) * np.linalg.norm(at), 1e-12)
    best = int(np.argmax(cosine))
    return (
        f"'{part}' was not trained on; by what is known of its name it is most like {np.array(names)[there][best]}"
        f" (cosine {cosine[best]:.2f})."
    )


def _of_sets(model: SavedModel, parts: list[str], unseen: list[str]) -> list[str]:
    if len(parts) < 2 or unseen:
        return []
    sets = trained_sets(model)
    if any(sorted(members) == parts for members in sets):
        return []
    alone = [part for part in parts if [part] in sets]
    said = "none was"
    if alone:
        said = "each was" if len(alone) == len(parts) else f"of these only {', '.join(alone)}"
    return [f"{JOIN.join(parts)} was not trained on together; alone {said}."]


def _of_dose(doses: list[float], dose: float | None) -> list[str]:
    if dose is None or not doses or any(np.isclose(dose, doses)):
        return []
    if dose > doses[-1]:
        return [f"Dose {dose:g} is above the highest of training, {doses[-1]:g}."]
    if dose < doses[0]:
        return [f"Dose {dose:g} is below the lowest of training, {doses[0]:g}."]
    return [f"Dose {dose:g} lies between those of training."]
