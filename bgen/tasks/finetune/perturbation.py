"""Fine-tuning for ``perturb``: the flow from control to perturbed populations.

The flow of a parent that has seen perturbations goes on, with rows for what is new; otherwise a small one is trained on
the adapted autoencoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.config.data import TrajectoriesConfig
from bgen.config.finetune import FinetuneConfig
from bgen.config.flow import MembersConfig
from bgen.config.load import load_finetune
from bgen.distributed import world as ranks
from bgen.effects.context_pool import controls_of
from bgen.effects.effects import Effects
from bgen.effects.fit import fit_effects
from bgen.effects.moments import moments_of
from bgen.errors import UserError
from bgen.evaluate.protocols.perturbation_scores import PerturbationScores
from bgen.genes.network import Network, read_network
from bgen.genes.vectors import NamedVectors
from bgen.hub.about import About
from bgen.hub.directory import ColumnInfo, Module, SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.grow import grow_members
from bgen.nn.lora import merge_lora
from bgen.order.keys import hash_keys
from bgen.order.trajectories import Trajectories
from bgen.progress import Say
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.columns import require_column
from bgen.tasks.finetune.course import whole_trajectories
from bgen.tasks.finetune.flow import choose_trained
from bgen.tasks.finetune.request import Request, require_wide_layers
from bgen.tasks.finetune.task import Job, Task
from bgen.tasks.perturb.held_out import require_scorable, score_held_out, split_rows
from bgen.tasks.perturb.screen import (
    Columns,
    ScreenData,
    read_doses,
    read_screen,
    require_controls,
    require_plain_counts,
)
from bgen.tasks.time.axis import trained_over_time
from bgen.tasks.user_cells import UserCells, UserData
from bgen.train.stages.members import COEXPRESSION_CELLS, LabelSets, TrainedMembers, read_named_vectors
from bgen.train.stages.populations_in_memory import EncodedCells, PopulationStage
from data_tools.check.labels import JOIN

PERTURBATION = "finetune/perturbation"
"""Configuration of a fine-tuning on a screen."""

WATCHED = 0.1
"""Share of the perturbed cells that early stopping watches."""

LEAST_TOGETHER, MOST_TOGETHER = 8, 32
"""Cells of a population in a batch of a new flow."""


def knows_perturbations(model: SavedModel) -> bool:
    """Whether a model has a flow along perturbations."""
    return isinstance(model.module, LatentFlow) and bool(model.module.conditions.set_names)


@dataclass(frozen=True)
class KnownByName:
    """What is to be known of perturbations by name: settings, and the regulatory network if one is given."""

    config: MembersConfig
    network: Network | None


class Perturb(Task[KnownByName]):
    """Control cells under a perturbation; prepared is what is to be known of perturbations by name."""

    def require(self, request: Request) -> None:
        """See :class:`Task`."""
        if request.columns is None:
            raise UserError(
                "--task perturb needs --perturbation (an obs column) and --control (its value for controls)."
            )

    def check(self, parent: SavedModel, adata: AnnData, request: Request) -> None:
        """See :class:`Task`."""
        columns = _columns(request)
        require_wide_layers(parent, request)
        for name in columns.strata:
            require_column(adata, name)
        given = columns.labels(adata)
        control = require_controls(given, columns)
        if (control | (given == "")).all():
            raise UserError(f"All cells of obs['{columns.perturbation}'] are controls: there is nothing to learn from.")
        if knows_perturbations(parent) and trained_over_time(parent):
            raise UserError(
                "This model knows courses under perturbations; trained on a screen without times it would forget them."
                " Take a model of pairs (data.trajectories.times=2), or its VAE."
            )
        if knows_perturbations(parent) and request.network is not None:
            raise UserError("--network: the model knows perturbations already, in its own way: leave it out.")
        read_doses(adata, columns, given)

    def configure(self, adata: AnnData, request: Request, overrides: Sequence[str]) -> FinetuneConfig:
        """See :class:`Task`."""
        return load_finetune(PERTURBATION, overrides)

    def resolve(self, parent: SavedModel, data: UserData, request: Request) -> Request:
        """See :class:`Task`; doses are read in the unit of a parent that knows some."""
        columns, unit = _columns(request), parent.about.units.get("dose") if knows_perturbations(parent) else None
        found = replace(columns, dose_unit=unit).resolved(data.adata)
        if unit is not None and found.dose_unit not in (None, unit):
            raise UserError(
                f"obs['{columns.dose}'] holds doses in {found.dose_unit}, and the model's are in {unit}: write them"
                f" as texts with their unit, such as '10 {found.dose_unit}', and they are converted."
            )
        return replace(request, columns=replace(found, dose_unit=found.dose_unit or unit))

    def understood(self, adata: AnnData, request: Request) -> list[str]:
        """See :class:`Task`."""
        return _columns(request).sentences(adata)

    def hold_out(self, data: UserData, request: Request, seed: int) -> tuple[UserData, UserData | None]:
        """See :class:`Task`."""
        if not request.hold_out:
            return data, None
        train, back = split_rows(data.adata, _columns(request), request.hold_out, seed)
        return data[train], data[back]

    def prepare(self, grown: SavedModel, adata: AnnData, request: Request) -> KnownByName:
        """See :class:`Task`."""
        columns = _columns(request)
        config = MembersConfig(column=columns.perturbation, amount=columns.dose, network=request.network)
        network = None if request.network is None else read_network(request.network, grown.genes)
        return KnownByName(config, network)

    def told(self, grown: SavedModel, cells: UserCells, request: Request) -> dict[str, tuple[ColumnInfo, NDArray[Any]]]:
        """See :class:`Task`: the labels, as sets in one order of their names, and the doses."""
        columns = _columns(request)
        given = columns.labels(cells.adata)
        texts = {text: _normal(columns, str(text)) for text in np.unique(given)}
        label = np.array([texts[text] for text in given], dtype=object)
        known = _known_labels(grown)
        categories = [*known, *sorted({*label.tolist()} - {*known, ""})]
        place = {name: code for code, name in enumerate(categories)}
        codes = np.array([place.get(text, -1) for text in label], np.int64)
        told: dict[str, tuple[ColumnInfo, NDArray[Any]]] = {
            columns.perturbation: (ColumnInfo("perturbation", "category", categories), codes)
        }
        if columns.dose is not None:
            doses = read_doses(cells.adata, columns, given).astype(np.float32)
            there = doses[np.isfinite(doses)]
            info = ColumnInfo("dose", "number", [], float(there.mean()), float(there.std()) or 1.0)
            told[columns.dose] = (info, doses)
        return told

    def require_scorable(self, grown: SavedModel, cells: UserCells, kept_back: UserData, request: Request) -> None:
        """See :class:`Task`."""
        require_scorable(cells, kept_back.adata, _columns(request), grown.genes)

    def train(self, job: Job, prepared: KnownByName) -> tuple[Module, About]:
        """See :class:`Task`."""
        model, config, request, world = job.model, job.settings("flow", "perturbation"), job.request, ranks.current()
        columns = _columns(request)
        require_plain_counts(model.saved.codec)
        data = read_screen(model, job.cells, columns)
        used = np.flatnonzero(columns.labels(job.cells.adata) != "")
        codes = job.memory.obs[columns.perturbation][used]
        doses = job.memory.obs[columns.dose][used] if columns.dose is not None else None
        if prepared.network is not None:
            job.runs.say(prepared.network.sentence(data.targets))
        members = self._members(job, data, prepared.config, doses)
        flow = self._flow(job, config, members)
        shape = TrajectoriesConfig(along="perturbation", system=list(columns.strata), times=2, cells=_together(data))
        config = config.model_copy(update={"train": whole_trajectories(config.train, shape, world.size)})
        watched = _watched(data, config.seed)
        control = job.grown.columns[columns.perturbation].categories.index(columns.controls[0])
        parts = np.flatnonzero(~watched), np.flatnonzero(watched | (data.screen.label < 0))
        train, valid = (_trajectories(data, codes, control, doses, rows) for rows in parts)
        obs = {name: values[used] for name, values in job.memory.obs.items() if name in flow.conditions.names}
        stage = PopulationStage(
            config,
            flow,
            data.cells,
            EncodedCells(data.screen.mean, data.screen.std, obs),
            shape,
            train,
            valid,
            world,
            job.runs.fingerprint(model.saved),
        )
        effects = self._effects(job, data, members)
        job.runs.fit(config, stage)
        merge_lora(flow.backbone)
        effects = effects.with_share(config.flow.own_share)
        flow.averages = effects.tables(members.vectors.network)
        said = members.facts(columns.strata, effects, [data.strata[number] for number in effects.contexts])
        told: dict[str, Any] = {"perturbation": said, "control": columns.controls[0], "trajectories": shape}
        if columns.dose is not None:
            told["roles"] = {**job.about.roles, "dose": columns.dose}
            rest = {role: unit for role, unit in job.about.units.items() if role != "dose"}
            told["units"] = rest | ({"dose": columns.dose_unit} if columns.dose_unit else {})
        return flow, job.about.model_copy(update=told)

    def score(
        self, model: AnnDataModel, cells: UserCells, kept_back: UserCells, request: Request, say: Say
    ) -> PerturbationScores | None:
        """See :class:`Task`."""
        return score_held_out(model, cells, kept_back, _columns(request), say=say)

    def _members(
        self, job: Job, data: ScreenData, config: MembersConfig, doses: NDArray[np.float32] | None
    ) -> TrainedMembers:
        """Return what the labels mean: to a flow that goes on, its own members first."""
        grown, columns = job.grown, _columns(job.request)
        labels = grown.columns[columns.perturbation].categories
        if not knows_perturbations(grown):
            of = [_members_of(columns, label, data) for label in labels]
            sets = LabelSets.of(of, sorted({name for members in of for name in members}), columns.grammar)
            control = data.cells.counts[np.flatnonzero(data.screen.label < 0)]
            some = np.random.default_rng(0).permutation(control.shape[0])[:COEXPRESSION_CELLS]
            asked = {"column": config.column, "amount": config.amount, "network": config.network}
            config = (job.config.flow.members or MembersConfig()).model_copy(update=asked)
            vectors = read_named_vectors(config, grown.genes, control[np.sort(some)])
            return TrainedMembers(columns.perturbation, columns.dose, sets, vectors, doses, config)
        facts, flow = grown.about.perturbation, grown.module
        assert facts is not None
        assert isinstance(flow, LatentFlow)
        (embedding,) = flow.conditions.member_embeddings.values()
        known = [[facts.perturbations[at] for at in row if at >= 0] for row in embedding.label_own.tolist()]
        of = [
            known[code] if code < len(known) else _members_of(columns, label, data) for code, label in enumerate(labels)
        ]
        new = sorted({name for members in of for name in members} - {*facts.perturbations})
        if new:
            job.runs.say(f"New perturbations: {', '.join(new[:8])}{', ...' if len(new) > 8 else ''}.")
        sets = LabelSets.of(of, [*facts.perturbations, *new], columns.grammar)
        network, edges = None, (0, 0)
        if facts.network is not None and flow.averages is not None:
            network, edges = flow.averages.network.numpy(), (facts.network.edges, facts.network.edges_in_file)
        vectors = NamedVectors(grown.genes, facts.named, embedding.vectors.numpy(), network, edges)
        amounts = np.full(1, float(embedding.typical_amount), np.float32) if embedding.sizes.amount else doses
        assert flow.config.members is not None
        return TrainedMembers(columns.perturbation, columns.dose, sets, vectors, amounts, flow.config.members)

    def _effects(self, job: Job, data: ScreenData, members: TrainedMembers) -> Effects:
        """Estimate average effects; what the parent knows of perturbations that the data lack stays."""
        sets = [tuple(sorted(of)) for of in data.labels["members"]]
        moments = moments_of(data.cells.counts, data.screen.stratum, data.screen.label)
        effects = fit_effects(moments, sets, data.labels["dose"].to_numpy(np.float64), members.known())
        parent, facts = job.grown.module, job.grown.about.perturbation
        if not isinstance(parent, LatentFlow) or parent.averages is None or facts is None:
            return effects
        before = Effects.of_tables(parent.averages, facts.effects, facts.pooling)
        return effects.with_others(before, controls_of(data.cells.counts[data.screen.label < 0]))

    def _flow(self, job: Job, config: FinetuneConfig, members: TrainedMembers) -> LatentFlow:
        """Return the parent's flow with rows for what is new, or a new one."""
        grown, sizes = job.grown, {members.column: members.sizes}
        if knows_perturbations(grown):
            assert isinstance(grown.module, LatentFlow)
            flow = grow_members(grown.module, members.column, members.sizes)
            choose_trained(flow, job.request.mode)
        else:
            job.runs.say("The model has no flow along perturbations: a new one is trained on the autoencoder.")
            flow = LatentFlow(config.flow.model_copy(update={"members": members.config}), grown.codec, {}, {}, sizes)
        members.describe(flow.conditions.member_embeddings[members.column])
        return flow


def _columns(request: Request) -> Columns:
    assert request.columns is not None, "checked at the start"
    return request.columns


def _normal(columns: Columns, label: str) -> str:
    """Return a label with its members in one order; that of controls for all that mean "not perturbed"; "" for none."""
    if not label:
        return ""
    return JOIN.join(columns.grammar.members(label)) or columns.controls[0]


def _known_labels(grown: SavedModel) -> list[str]:
    """Return the labels that a flow along perturbations knows, in the order of their codes."""
    if not knows_perturbations(grown):
        return []
    assert isinstance(grown.module, LatentFlow)
    return grown.columns[grown.module.conditions.set_names[0]].categories


def _members_of(columns: Columns, label: str, data: ScreenData) -> list[str]:
    """Return the members of a label of :func:`_normal`."""
    if label == columns.controls[0]:
        return []
    return next((names for names in data.labels["members"] if JOIN.join(names) == label), [])


def _together(data: ScreenData) -> int:
    """Return how many cells of a population a batch holds: no more than most have."""
    sizes = np.bincount(data.screen.label[data.screen.label >= 0])
    return int(np.clip(np.median(sizes[sizes > 0]), LEAST_TOGETHER, MOST_TOGETHER))


def _watched(data: ScreenData, seed: int) -> NDArray[np.bool_]:
    """Return which cells ``[N]`` early stopping watches: a share of the perturbed ones, of every population that is
    large enough.
    """
    label, stratum = data.screen.label, data.screen.stratum
    population = pd.factorize(pd.MultiIndex.from_arrays([label, stratum]))[0]
    order = np.lexsort((hash_keys(seed, np.arange(len(label))), population))
    sizes = np.bincount(population)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    watched = np.zeros(len(label), bool)
    watched[order] = place < np.floor(WATCHED * sizes)[population[order]]
    watched &= label >= 0
    if not watched.any():
        watched[np.flatnonzero(label >= 0)[-1]] = True
    return watched


def _trajectories(
    data: ScreenData, codes: I64, control: int, doses: NDArray[np.float32] | None, rows: I64
) -> Trajectories:
    """Return the trajectories of some cells; those of strata without control cells have all others' controls."""
    stratum, is_control = data.screen.stratum[rows], data.screen.label[rows] < 0
    alone = ~np.isin(stratum, np.unique(stratum[is_control]))
    stratum = np.where(alone, stratum.max() + 1, stratum)
    if alone.any():
        again = np.flatnonzero(is_control)
        rows = np.concatenate([rows, rows[again]])
        stratum = np.concatenate([stratum, np.full(len(again), stratum.max())])
        order = np.argsort(rows, kind="stable")
        rows, stratum = rows[order], stratum[order]
    label = np.where(data.screen.label[rows] < 0, control, codes[rows])
    amount = None if doses is None else doses[rows]
    return Trajectories.along_perturbation(rows, [stratum], label, control, amount)
