"""The stage that trains the flow: in the latent space of a frozen VAE, or on log counts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from torch import nn

from bgen.arrays import I64
from bgen.checkpoint.files import sha256
from bgen.config.flow import FlowConfig
from bgen.config.run import Config
from bgen.config.section import named_files
from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.distributed.world import World
from bgen.effects.effects import Effects
from bgen.effects.fit import fit_effects
from bgen.errors import UserError
from bgen.genes.table import hash_genes
from bgen.hub.directory import SavedModel, load_directory
from bgen.models.codec import CountsCodec
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.log_counts import MOST_GENES, LogCounts
from bgen.order.cells import Cells, pick
from bgen.order.groups import parts
from bgen.order.mixing import Mixing
from bgen.store.store import Store
from bgen.store.weighting import count_values
from bgen.train.stages.average_effects import MOST_CELLS, moments_of_store, number_sets
from bgen.train.stages.from_store import StoreStage
from bgen.train.stages.levels import fit_generated_levels
from bgen.train.stages.members import COEXPRESSION_CELLS, TrainedMembers, label_sets, read_named_vectors
from bgen.train.stages.trajectories_from_store import population_means
from bgen.train.stages.whitening import fit_whitening


@dataclass(frozen=True)
class _Told:
    """Columns of labels and amounts that a flow is told of, if any."""

    label: str | None = None
    amount: str | None = None

    @property
    def columns(self) -> list[str]:
        return [name for name in (self.label, self.amount) if name is not None]

    @classmethod
    def of(cls, config: Config, store: Store, conditions: Sequence[str]) -> _Told:
        """Find them in the store; UserError if they are not there or are no labels and numbers."""
        members = config.flow.members
        if members is None:
            return cls()
        label = store.column_name(members.column)
        amount = None if members.amount is None else store.column_name(members.amount)
        for name, kind in ((label, "category"), (amount, "number")):
            if name is not None and store.manifest.columns[name].kind != kind:
                raise UserError(f"flow.members: the column '{name}' of {store.folder} is no {kind}.")
            if name in conditions:
                raise UserError(f"flow.conditions: '{name}' is told by flow.members already; leave it out.")
        if store.manifest.control is None:
            raise UserError(
                f"flow.members: the store {store.folder} does not say which value of '{label}' is the control. Build it"
                " with --control LABEL."
            )
        return cls(label, amount)


class FlowStage(StoreStage):
    """Trains the velocity network on what a codec makes of cells."""

    def __init__(self, config: Config, store: Store, world: World) -> None:
        self.codec, between = _codec(config.flow, store, world)
        conditions = [store.column_name(name) for name in config.flow.conditions]
        told = _Told.of(config, store, conditions)
        columns = list(dict.fromkeys([*conditions, *told.columns, *self.codec.covariates]))
        super().__init__(config, store, world, columns)
        if isinstance(self.codec, LogCounts):
            fit_whitening(self.codec.to(world.device), self.reader, config.data.split, world)
            self.codec.cpu()  # as one is that is loaded; the engine moves the module as a whole
        categories, self.numbers = {}, {}
        train_cells = store.split(config.data.split)
        for name in conditions:
            about = store.manifest.columns[name]
            if about.kind == "category":
                categories[name] = len(about.categories)
            else:
                self.numbers[name] = mean_and_std(pick(store.column(name)[1], train_cells))
        self.members: TrainedMembers | None = None
        if told.label is not None:
            self.members = self._members(told)
        sizes = {} if self.members is None else {self.members.column: self.members.sizes}
        if self.trajectories is None and world.is_main:
            _tell_of_mixing(config.flow)
        self.module = LatentFlow(config.flow, self.codec, categories, self.numbers, sizes)
        if self.members is not None:
            self.members.describe(self.module.conditions.member_embeddings[self.members.column])
        self.fingerprint |= between
        if files := named_files(config.flow.members):
            self.fingerprint["known_of_members"] = [sha256(path) for path in files]
        if config.flow.coupling.cells > 0:
            assert self.trajectories is not None, "the configuration checks that"
            self.trajectories.require_room(self.codec.size)
        self._mixing: Mixing | None = None
        self.effects: Effects | None = None
        self.context_names: list[list[str]] = []

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch | PackedBatch]]:
        """See :class:`bgen.train.stages.stage.Stage`.

        Before the first batch, starts are planned and populations mixed between systems, if that is asked for.
        """
        mixing = self.config.flow.mixing
        if self.trajectories is not None and self.config.flow.coupling.cells > 0 and self.module.plans is None:
            self.module.plans = self.trajectories.plans(self.codec)
        if self.trajectories is None or mixing.share == 0:
            return super().train_batches(start_step)
        if self._mixing is None:
            trajectories = self.trajectories.order.trajectories
            means = population_means(self.codec, self.reader, trajectories, mixing.cells, self.world)
            self._mixing = Mixing(trajectories, means, mixing.share, mixing.concentration, self.config.seed)
        return self.trajectories.train(start_step, self._mixing)

    def _members(self, told: _Told) -> TrainedMembers:
        """Read what the labels of the store mean, and what is known of their members by name."""
        config, store, split = self.config.flow.members, self.store, self.config.data.split
        assert config is not None
        assert told.label is not None
        column, codes = store.column(told.label)
        cells = store.split(split)
        codes = pick(codes, cells)
        control = str(store.manifest.control)
        genes = store.genes
        names = {*genes["id"], *genes["symbol"]}
        there = count_values(codes, len(column.categories))[1:] > 0
        trained = {column.categories[code] for code in np.flatnonzero(there).tolist()}
        sets = label_sets(column.categories, [control], config.separator, names, trained)
        is_control = np.array([sets.grammar.is_control(label) for label in column.categories])
        controls = _where(np.append(is_control, False)[codes], cells)
        some = store.sample(controls if len(controls) else cells, COEXPRESSION_CELLS, 0)
        batch = self.reader.read_cells(some)
        shape = (len(some), batch.n_genes)
        counts = sp.csr_matrix((batch.counts.numpy(), batch.indices.numpy(), batch.indptr.numpy()), shape)
        vectors = read_named_vectors(config, genes, counts)
        amounts = None if told.amount is None else pick(store.column(told.amount)[1], cells)
        return TrainedMembers(told.label, told.amount, sets, vectors, amounts, config)

    def finish(self, module: nn.Module) -> None:
        """Fit the genes' levels in the flow's own copy of the codec, and average effects, shared among the ranks.

        Effects that change over time have no average: of courses the flow answers alone.
        """
        assert isinstance(module, LatentFlow)
        if self.config.flow.fit_levels:
            fit_generated_levels(module, self.config.sample, self.reader, self.config.data.split, self.world)
        shape = self.config.data.trajectories
        along = shape is not None and shape.along == "perturbation" and shape.times == 2
        if self.members is not None and along and self.config.flow.averages:
            self.effects = self._effects(self.members)
            if self.effects is not None:
                module.averages = self.effects.tables(self.members.vectors.network)

    def _effects(self, members: TrainedMembers) -> Effects | None:
        """Estimate average effects over the training cells, in each system with its own control cells."""
        store, trajectories = self.store, self.config.data.trajectories
        assert trajectories is not None
        every = store.split(self.config.data.split)
        column, codes = store.column(members.column)
        if count_values(pick(codes, every), len(column.categories))[0]:
            every = _where(pick(codes, every) >= 0, every)
        cells = store.sample(every, MOST_CELLS, 0)
        codes = codes[cells].astype(np.int64)
        amounts = np.full(len(cells), np.nan)
        if members.amount is not None:
            amounts = store.column(members.amount)[1][cells].astype(np.float64)
        sets = members.sets
        is_control = np.array([sets.grammar.is_control(label) for label in column.categories])
        label, of = number_sets(codes, amounts, is_control, sets.own)
        system = [store.column(name) for name in trajectories.system]
        values = np.stack([np.zeros(len(cells)), *(column[1][cells] for column in system)], 1)
        contexts, context = np.unique(values, axis=0, return_inverse=True)
        moments = moments_of_store(self.reader, cells, context.ravel().astype(np.int64), label, self.world)
        if moments is None:
            if self.world.is_main:
                print(
                    "warning: average effects of so many contexts and perturbations are too large to hold: the flow"
                    " answers alone.",
                    file=sys.stderr,
                    flush=True,
                )
            return None
        names = [tuple(sorted(sets.names[at] for at in sets.own[code] if at >= 0)) for code, _ in of]
        effects = fit_effects(moments, names, np.array([amount for _, amount in of]), members.known())
        effects = effects.with_share(self.config.flow.own_share)
        self.context_names = [
            [
                column.categories[int(value)] if column.kind == "category" and value >= 0 else f"{value:g}"
                for (column, _), value in zip(system, contexts[number][1:], strict=True)
            ]
            for number in effects.contexts
        ]
        return effects


def _codec(flow: FlowConfig, store: Store, world: World) -> tuple[CountsCodec, dict[str, Any]]:
    """Return what stands between counts and what flows, and what must be the same of it when a run is resumed."""
    if flow.space == "latent":
        assert flow.vae is not None, "the configuration checks that"
        model = load_vae(flow.vae, store)
        return model.vae, {"vae": model.fingerprint()}
    genes, said = store.manifest.n_genes, []
    if flow.vae is not None:
        said.append(f"flow.vae={flow.vae} is not used: flow.space=log_counts needs no VAE.")
    if genes > MOST_GENES:
        said.append(
            f"warning: flow.space=log_counts makes a network with {genes:,} inputs and outputs, one for each gene:"
            f" above {MOST_GENES:,} it is large and slow. Build the store with fewer genes (--reference), or train in"
            " the latent space of a VAE."
        )
    if said and world.is_main:
        print("\n".join(said), file=sys.stderr, flush=True)
    return LogCounts(flow.log_counts, genes), {"log_counts": flow.log_counts.model_dump(mode="json")}


def _tell_of_mixing(flow: FlowConfig) -> None:
    """Warn where single cells pay for mixing that they have no use for."""
    idle = [axis for axis in ("time", "cells") if axis in flow.backbone.axes]
    if idle:
        print(
            f"warning: flow.backbone={flow.backbone.name} mixes over {' and '.join(idle)}, but this flow learns single"
            " cells, which have neither neighbours nor a course. flow.backbone.name=mlp is cheaper (extends: [flow,"
            " sizes/cells/...]); or train trajectories.",
            file=sys.stderr,
            flush=True,
        )


def mean_and_std(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return mean and standard deviation of the known values; 0 and 1 where there is nothing to scale by."""

    def known() -> Iterator[np.ndarray[Any, Any]]:
        return (values[part][np.isfinite(values[part])].astype(np.float64) for part in parts(len(values)))

    n = sum(map(len, known()))
    if n == 0:
        return 0.0, 1.0
    mean = float(sum(some.sum() for some in known())) / n
    return mean, float(np.sqrt(sum(np.square(some - mean).sum() for some in known()) / n)) or 1.0


def _where(which: NDArray[np.bool_], cells: Cells) -> I64:
    """Return the numbers of some ``cells [n]``."""
    return np.flatnonzero(which) + cells.start if isinstance(cells, range) else cells[which]


def load_vae(folder: Path, store: Store) -> SavedModel:
    """Return the VAE of a run folder or of an exported directory, with the store's genes in the store's order.

    Raises
    ------
    UserError
        If there is none, or it was trained on other genes.
    """
    exported = folder if (folder / "config.json").is_file() else folder / "model"
    if not (exported / "config.json").is_file():
        raise UserError(f"flow.vae: there is no trained VAE in {folder}. `bgen train` with stage: vae makes one.")
    model = load_directory(exported)
    if hash_genes(model.genes["id"].tolist()) != store.manifest.genes_sha256:
        raise UserError(
            f"flow.vae: the VAE in {folder} was trained on other genes (or in another order) than {store.folder} has."
            " Train the VAE on this store."
        )
    return model
