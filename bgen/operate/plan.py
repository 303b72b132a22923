"""``bgen plan``: what a run will need, told before it starts: memory, floating-point operations, time, disk.

The module is built and one small forward pass is run here, on the CPU, with cells of the store's density; the rest is
arithmetic.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from bgen.config.flow import FlowConfig, MemberSizes
from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.config.vae import VAEConfig
from bgen.cpus import cpus
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.errors import UserError, nearest
from bgen.hub.directory import load_directory
from bgen.models.codec import Codec
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.log_counts import LogCounts
from bgen.models.vae.vae import VAE
from bgen.operate.plan_step import (
    READ_BYTES,
    Cluster,
    StepTime,
    Work,
    advice,
    balanced_cells,
    count_launches,
    step_time,
    weak_scaling,
)
from bgen.store.format.manifest import Manifest
from bgen.store.open import open_data
from bgen.track.devices import DEVICES
from bgen.train.engine.deepspeed_json import BatchPlan, batch_plan
from bgen.train.engine.memory import Memory, activation_bytes, memory
from bgen.train.stages.members import label_sets

FILL = 0.9
"""Share of the memory that the recommended micro batch may take."""

PROBE = (8, 32)
"""Cells of the two forward passes from which the activations of a micro batch are extrapolated."""


@dataclass(frozen=True)
class Plan:
    """What a run will need. Bytes are of one rank unless said otherwise.

    Attributes
    ----------
    parameters
        Part of the model to its number of parameters.
    trained, frozen
        Their sums.
    ranks
        Processes in all.
    batch
        Micro batch and accumulation of the configuration on so many ranks.
    activations
        Bytes of the micro batch's forward and backward pass.
    memory
        For each ZeRO stage, without and with offload.
    chosen
        The configured one of these.
    recommended_micro_batch
        Largest micro batch that divides a rank's share and fits; None if not even one cell does.
    limit
        Bytes that a rank may take.
    flops_per_cell, flops_per_step
        Forward and backward pass of one cell, and of the global batch.
    tokens_per_cell
        Expressed genes of a cell, on average.
    cells_per_day, hours
        At ``mfu`` of the GPU's peak and what the ranks tell each other, or, without a GPU, at the speed of this
        machine, where ranks cost nothing; ``hours`` for all steps.
    checkpoint, checkpoints
        Bytes on disk of one, and of all that are kept.
    step
        Of what a step consists; None without a GPU, and so are the following.
    scaling
        Hosts, cells/s and share of the speed of one host that each gives, with as many cells a rank.
    balanced
        Cells a rank from which computing takes longer than what the ranks tell each other, and than launches.
    read
        Bytes/s that a host reads.
    advice
        What would be better.
    """

    parameters: dict[str, int]
    trained: int
    frozen: int
    ranks: int
    batch: BatchPlan
    activations: int
    memory: list[Memory]
    chosen: Memory
    recommended_micro_batch: int | None
    limit: float
    flops_per_cell: int
    flops_per_step: int
    tokens_per_cell: float
    cells_per_day: float
    hours: float
    checkpoint: int
    checkpoints: int
    speed: str
    step: StepTime | None = None
    scaling: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    balanced: int | None = None
    read: float | None = None
    advice: list[str] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        tree = dataclasses.asdict(self)
        tree["tokens_per_day"] = self.cells_per_day * self.tokens_per_cell
        for entry, made in zip((*tree["memory"], tree["chosen"]), (*self.memory, self.chosen), strict=True):
            entry |= {"device": made.device, "resident": made.resident}
        return tree

    def table(self) -> Group:
        """Return what `bgen plan` shows."""
        facts = Table(show_header=False, box=None)
        parts = ", ".join(f"{name} {_count(n)}" for name, n in self.parameters.items())
        frozen = f", {_count(self.frozen)} of them frozen" if self.frozen else ""
        tokens = self.cells_per_day * self.tokens_per_cell
        facts.add_row("parameters", f"{_count(self.trained + self.frozen)} ({parts}){frozen}")
        facts.add_row("batch", f"{self.ranks} ranks x {self.batch.accumulation} x {self.batch.micro} cells")
        micro = self.recommended_micro_batch
        facts.add_row("recommended", f"train.micro_batch={micro}" if micro else "nothing fits: raise zero or offload")
        facts.add_row("activations", f"{_bytes(self.activations)} a micro batch")
        facts.add_row("FLOPs", f"{self.flops_per_cell:.3g} a cell, {self.flops_per_step:.3g} a step")
        facts.add_row("speed", f"{_count(self.cells_per_day)} cells a day, {_count(tokens)} tokens ({self.speed})")
        if self.step is not None:
            step = self.step
            of = (("computing", step.compute), ("gradients", step.reduce), ("weights", step.gather))
            told = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in of if seconds)
            facts.add_row("step", f"{1000 * step.seconds:.3g} ms: {told}")
            facts.add_row("scaling", ", ".join(f"{n} hosts {share:.0%}" for n, _, share in self.scaling[1:]))
            facts.add_row("reading", f"{_bytes(self.read or 0)} a second and host")
        facts.add_row("run", f"{self.hours:.3g} h")
        facts.add_row("disk", f"{_bytes(self.checkpoint)} a checkpoint, {_bytes(self.checkpoints)} for all kept")
        sizes = Table(title=f"memory of a rank (limit {_bytes(self.limit)})", title_justify="left")
        for name in ("ZeRO", "offload", "weights", "optimiser", "working", "device", "host"):
            sizes.add_column(name, justify="right")
        for m in self.memory:
            row = [str(m.zero), "cpu" if m.offload else "", *map(_bytes, (m.weights, m.optimizer, m.working))]
            style = "bold" if m == self.chosen else "red" if m.device > self.limit else None
            sizes.add_row(*row, _bytes(m.device), _bytes(m.host), style=style)
        return Group(facts, sizes, *self.advice)


def plan(
    config_path: str,
    overrides: list[str] | None = None,
    *,
    nodes: int = 1,
    ranks_per_node: int = 1,
    gpu: str | None = None,
    mfu: float = 0.2,
    network: float = 400.0,
    genes: int | None = None,
    tokens: int | None = None,
) -> Plan:
    """Plan a run.

    Parameters
    ----------
    config_path, overrides
        The configuration, as for ``bgen train``.
    nodes, ranks_per_node
        Hosts, and processes on each.
    gpu
        Key of :data:`bgen.track.devices.DEVICES`; None plans for CPUs like this machine's.
    mfu
        Share of the GPU's peak that is reached.
    network
        Gb/s of each rank's network card.
    genes, tokens
        Genes, and expressed genes of a cell; needed only if the store is not there yet.

    Raises
    ------
    UserError
        If the configuration is wrong, or the store cannot be opened and ``genes`` and ``tokens`` are not given.
    """
    config = load_config(config_path, overrides or [])
    if gpu is not None and gpu not in DEVICES:
        raise UserError(f"There is no GPU '{gpu}' in the table.{nearest(gpu, DEVICES)}")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu}: a share of the peak, above 0 and at most 1.")
    train, ranks = config.train, nodes * ranks_per_node
    batch = batch_plan(train, ranks)
    subject = _Subject(config, genes, tokens)
    module = subject.module
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters()) - trained
    largest = max((p.numel() for p in module.parameters() if p.requires_grad), default=0)
    activations, seconds_per_cell = subject.measure()

    def needs(micro: int, zero: int, offload: bool) -> Memory:
        sizes = {"trained": trained, "frozen": frozen, "largest": largest, "activations": activations(micro)}
        return memory(train.model_copy(update={"micro_batch": micro}), ranks=ranks, zero=zero, offload=offload, **sizes)

    offloaded = train.offload.optimizer != "none"
    chosen = needs(batch.micro, train.zero, offloaded)
    table = [needs(batch.micro, zero, offload) for zero in range(4) for offload in (False, True) if zero or not offload]
    limit = FILL * (DEVICES[gpu].memory if gpu else psutil.virtual_memory().total / ranks_per_node)
    share = train.global_batch // ranks
    fitting = [
        micro
        for micro in range(1, share + 1)
        if share % micro == 0 and _peak(needs(micro, train.zero, offloaded), gpu) <= limit
    ]
    per_cell = subject.flops(batch.micro)
    on_gpus: dict[str, Any] = {}
    if gpu is None:
        at_once = min(ranks_per_node, cpus())
        cells_per_second = nodes * at_once / seconds_per_cell
        shared = f", {ranks_per_node} ranks on its {at_once} CPUs" if at_once < ranks_per_node else ""
        speed = f"by a pass on this machine, one thread a rank{shared}"
    else:
        device = DEVICES[gpu]
        wide, reached = 2 if train.precision == "pure_bf16" else 4, mfu * device.peak(train.precision)
        cluster = Cluster(nodes, ranks_per_node, device, network * 1e9 / 8)
        work = Work(wide * trained, per_cell, share, batch.accumulation, train.zero, reached, subject.launches())
        step = step_time(work, cluster)
        cells_per_second = step.cells_per_s
        speed = f"{ranks} x {gpu} at {mfu:.0%} of the peak"
        on_gpus = {
            "step": step,
            "scaling": weak_scaling(work, cluster),
            "balanced": balanced_cells(work, cluster),
            "read": READ_BYTES * subject.tokens * cells_per_second / nodes,
            "advice": advice(work, cluster, [m.zero for m in table if not m.offload and m.device <= limit]),
        }
    kinds = 3 + (train.ema > 0) + (train.patience > 0)  # weights and two moments, average, best
    checkpoint = 4 * (kinds * trained + frozen)
    return Plan(
        parameters={name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()},
        trained=trained,
        frozen=frozen,
        ranks=ranks,
        batch=batch,
        activations=activations(batch.micro),
        memory=table,
        chosen=chosen,
        recommended_micro_batch=max(fitting, default=None),
        limit=limit,
        flops_per_cell=per_cell,
        flops_per_step=per_cell * train.global_batch,
        tokens_per_cell=subject.tokens,
        cells_per_day=86_400 * cells_per_second,
        hours=train.steps * train.global_batch / cells_per_second / 3600,
        checkpoint=checkpoint,
        checkpoints=train.keep * checkpoint,
        speed=speed,
        **on_gpus,
    )


class _Subject:
    """The module that would be trained, and cells like the store's."""

    def __init__(self, config: Config, genes: int | None, tokens: int | None) -> None:
        self.config = config
        manifest = None
        if genes is None or tokens is None:
            try:
                manifest = open_data(config.data).manifest
            except UserError as error:
                raise UserError(f"{error}\nOr plan without it: --genes and --expressed (genes of a cell).") from None
        self.genes = genes or (manifest.n_genes if manifest else 0)
        self.tokens = float(tokens or (manifest.n_nonzeros / manifest.n_cells if manifest else 0))
        self.codec: Codec
        self.module: VAE | LatentFlow
        if config.stage == "vae" or config.flow.space == "latent":
            self.codec = self.module = VAE(*self._vae(manifest))
        else:
            self.codec = LogCounts(config.flow.log_counts, self.genes)
        if config.stage == "flow":
            categories = _categories(config.flow.conditions, manifest)
            self.module = LatentFlow(config.flow, self.codec, categories, {}, _sets(config.flow, manifest, self.genes))
        self.module.train()

    def _vae(self, manifest: Manifest | None) -> tuple[VAEConfig, int, dict[str, int]]:
        """What the VAE is built from; under a flow, the settings of the trained VAE if it is there."""
        config, path = self.config, self.config.flow.vae
        if config.stage == "flow" and path is not None:
            for folder in (path, path / "model"):
                if (folder / "config.json").is_file():
                    vae = load_directory(folder).vae
                    return vae.config, vae.n_genes, vae.covariates
            if (path / "config.yaml").is_file():
                config = load_config(path / "config.yaml")
        return config.vae, self.genes, _categories(config.vae.covariates, manifest)

    def measure(self) -> tuple[Callable[[int], int], float]:
        """Return bytes of activations as a function of the micro batch, and seconds per cell of both passes."""
        few, many = PROBE
        known = [*self.module.parameters(), *self.module.buffers()]
        sizes = []
        for cells in (few, few, many):  # the first is to warm up
            step, inputs = self._step(cells)
            sizes.append(activation_bytes(step, [*known, *inputs]))
        slope = max(0.0, (sizes[2] - sizes[1]) / (many - few))
        fixed = max(0.0, sizes[1] - slope * few)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            step, _ = self._step(many)
            begin = time.perf_counter()
            step().backward()
            seconds = (time.perf_counter() - begin) / many
        finally:
            torch.set_num_threads(threads)
        self.module.zero_grad(set_to_none=True)
        return lambda micro: round(fixed + slope * micro), seconds

    def launches(self) -> int:
        """Kernels of a forward and backward pass."""
        launches = count_launches(self._step(PROBE[0])[0])
        self.module.zero_grad(set_to_none=True)
        return launches

    def _step(self, cells: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """Return a forward pass on so many cells, and its inputs."""
        if not isinstance(self.module, LatentFlow) or self.config.data.trajectories is None:
            batch = self._batch(cells)
            inputs = [batch.indptr, batch.indices, batch.counts, batch.keys, batch.cells, *batch.obs.values()]
            return lambda: self.module(batch)["loss"].mean(), inputs
        T, N = self.config.data.trajectories.times, self.config.data.trajectories.cells
        B = max(1, round(cells / (T * N)))
        z, t = torch.randn(B, T, N, self.module.size), torch.rand(B, T)
        condition = torch.randn(B, T, self.config.flow.backbone.width)
        mask, when = torch.ones(B, T, N, dtype=torch.bool), torch.arange(float(T)).expand(B, T).contiguous()
        backbone = self.module.backbone
        # As if of `cells` cells, so that the line through two measurements is that of cells.
        return lambda: backbone(z, t, condition, mask, when).square().mean() * (cells / (B * T * N)), [z, t, condition]

    def _batch(self, cells: int) -> CellBatch:
        """Cells with the store's mean number of expressed genes, drawn at random."""
        generator = torch.Generator().manual_seed(0)
        n = min(self.genes, max(1, round(self.tokens)))
        rows = [torch.randperm(self.genes, generator=generator)[:n].sort().values for _ in range(cells)]
        names = set(self.codec.covariates)
        if isinstance(self.module, LatentFlow):
            names |= set(self.module.conditions.names)
        return CellBatch(
            torch.arange(0, cells * n + 1, n),
            torch.cat(rows).int(),
            torch.randint(1, 9, (cells * n,), generator=generator).float(),
            self.genes,
            keys=torch.arange(cells),
            cells=torch.arange(cells),
            obs={name: torch.zeros(cells, dtype=torch.int64) for name in names},
        )

    def flops(self, micro: int = 1) -> int:
        """Floating-point operations of forward and backward pass, a cell, where ``micro`` of them share tables."""
        trajectories = self.config.data.trajectories
        if trajectories is None or not isinstance(self.module, LatentFlow):
            return self.module.training_flops(self._batch(1).take(torch.zeros(micro, dtype=torch.int64))) // micro
        T, N = trajectories.times, trajectories.cells
        mask, time = torch.ones(1, T, N, dtype=torch.bool), torch.arange(float(T))[None]
        batch = TrajectoryBatch.of(self._batch(T * N), mask, time, torch.zeros(1, T, dtype=torch.bool))
        return self.module.training_flops(batch) // (T * N)


def _sets(flow: FlowConfig, manifest: Manifest | None, genes: int) -> dict[str, MemberSizes]:
    """Return the sizes of the condition that is a set of members, as far as the store tells: of co-expression alone."""
    members = flow.members
    if members is None:
        return {}
    column = members.column if manifest is None else manifest.roles.get(members.column, members.column)
    labels = [] if manifest is None or column not in manifest.columns else manifest.columns[column].categories
    controls = [manifest.control] if manifest is not None and manifest.control else []
    found = label_sets(labels, controls, members.separator, ()) if len(labels) > len(controls) else None
    sizes = MemberSizes(
        members=len(found.names) if found else 0,
        labels=len(labels),
        largest=found.own.shape[1] if found else 1,
        names=genes if members.components else 0,
        vector=members.components,
        amount=None,
        forget=members.forget,
    )
    return {column: sizes}


def _categories(columns: list[str], manifest: Manifest | None) -> dict[str, int]:
    """Return the number of categories of each column that has some; 100 where there is no store to ask."""
    if manifest is None:
        return dict.fromkeys(columns, 100)
    found = {}
    for name in columns:
        column = manifest.roles.get(name, name)
        if column not in manifest.columns:
            raise UserError(f"The store has no column or role '{name}'.{nearest(name, manifest.columns)}")
        found[column] = max(1, len(manifest.columns[column].categories))
    return found


def _peak(needed: Memory, gpu: str | None) -> int:
    return needed.device if gpu else needed.resident


def _bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _count(number: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"
