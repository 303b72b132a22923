"""Control cells through the flow: the latents that they would have under a perturbation.

A flow that mixes cells has learnt populations of a certain size, so control cells pass it in populations of that size,
dealt at random. The control population is observed, and every cell of the perturbed one starts where a control cell is;
or from noise, if the flow learnt that (``flow.source: noise``).

Axes: n cells, B populations, N cells of each, K members of a set, D latent size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.errors import UserError
from bgen.hub.about import Perturbation
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.models.generators.members import MemberEmbedding, Members
from bgen.order.keys import hash_keys
from bgen.tasks.batches import Batches
from bgen.tasks.time.axis import trained_over_time

CELLS_AT_ONCE = 8192
"""On a CPU, at most."""


def member_embedding(model: SavedModel) -> MemberEmbedding:
    """Return the embedding of perturbations of a model's flow.

    Raises
    ------
    UserError
        If the model knows none.
    """
    module = model.module
    if not isinstance(module, LatentFlow) or not module.conditions.set_names or model.about.perturbation is None:
        raise UserError(
            f"This model is a {model.kind} that has seen no perturbations. Train it on control and perturbed cells:"
            " `bgen finetune MODEL screen.h5ad --task perturb`, or `bgen train perturbation` on a store of many."
        )
    return module.conditions.member_embeddings[module.conditions.set_names[0]]


def facts_of(model: SavedModel) -> Perturbation:
    """Return what a model says of perturbations; UserError if it knows none."""
    member_embedding(model)
    facts = model.about.perturbation
    assert facts is not None, "it has an embedding of them"
    return facts


def times_of_perturbation(model: SavedModel, time: float | None) -> tuple[float, float]:
    """Return when the control and the perturbed population are, as training had them (:mod:`bgen.order.trajectories`).

    Raises
    ------
    UserError
        If a time is needed or not known, or one is given and the model knows none.
    """
    about = model.about
    if not trained_over_time(model) or not about.times:
        if time is not None:
            raise UserError("The model was trained on perturbed cells without their times: leave the time out.")
        return 0.0, 1.0
    first = min(about.times)
    before = 0.0 if first > 0 else first - 1
    unit = about.units.get("time", "")
    if time is None:
        raise UserError(
            f"Give the time since the perturbation: the model was trained at"
            f" {', '.join(f'{t:g}' for t in about.times[:12])} {unit}".rstrip()
            + "."
        )
    if not before < time <= max(about.times):
        raise UserError(
            f"The model knows times from {first:g} to {max(about.times):g} {unit}".rstrip() + f", not {time:g}."
        )
    return before, time


@torch.no_grad()
def transport(
    model: SavedModel,
    latents: Tensor,
    columns: Mapping[str, NDArray[Any]],
    members: Members,
    *,
    time: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Carry whitened latents ``[n, D + 1]`` of control cells to perturbed ones.

    Parameters
    ----------
    columns
        Conditions of the cells by column, codes or numbers ``[n]``, as far as they are known.
    members
        The perturbation: a set ``[1, K]``.
    time
        Since it began, for a model that was trained on time courses.
    seed
        Of the populations.
    """
    flow = model.module
    assert isinstance(flow, LatentFlow)
    before, after = times_of_perturbation(model, time)
    shape = model.about.trajectories
    N = min(len(latents), 32 if shape is None else shape.cells)
    order = np.random.default_rng([seed, 7]).permutation(len(latents))
    filled = np.resize(order, -(-len(order) // N) * N)  # the last population is filled up with cells of the first
    dealt = filled.reshape(-1, N)

    def some(start: int, stop: int) -> Tensor:
        rows = dealt[start:stop]
        z = latents[torch.from_numpy(rows)]
        B = len(rows)
        when = torch.tensor([before, after]).expand(B, 2)
        conditions: dict[str, Any] = {
            name: torch.from_numpy(np.repeat(_shared(values[rows])[:, None], 2, 1))
            for name, values in columns.items()
            if name in flow.conditions.names
        }
        conditions[flow.conditions.set_names[0]] = Members.stack([members.nothing, members], 1).expand(B, 2)
        if "time" in model.about.roles and model.about.roles["time"] in flow.conditions.number_names:
            conditions[model.about.roles["time"]] = when
        places = Places(
            mask=torch.ones(B, 2, N, dtype=torch.bool),
            time=when,
            observed=torch.tensor([True, False]).expand(B, 2),
            latents=torch.stack([z, z], 1),
            start=torch.stack([z, z], 1) if flow.config.source == "neighbours" else None,  # else from noise, as learnt
        )
        keys = torch.from_numpy(hash_keys(seed, np.stack([rows, rows + len(latents)], 1)).view(np.int64))
        with model.computing():
            return flow.sample_trajectories(conditions, keys, model.sample, places)[:, 1].cpu()

    batches = Batches(flow.vae.device, CELLS_AT_ONCE, unit=N)
    together = max(1, CELLS_AT_ONCE // N) if model.sample.solver == "adaptive" else None
    made = torch.cat(list(batches.over(len(dealt), some, together=together))).flatten(0, 1)
    moved = torch.zeros_like(latents)
    moved[torch.from_numpy(order)] = made[: len(order)]
    return moved


def _shared(values: NDArray[Any]) -> NDArray[Any]:
    """Return the value ``[B]`` that all cells of each population ``[B, N]`` share; unknown if they differ."""
    unknown = np.nan if values.dtype.kind == "f" else -1
    same = (values == values[:, :1]).all(1)
    return np.where(same, values[:, 0], unknown).astype(values.dtype)
