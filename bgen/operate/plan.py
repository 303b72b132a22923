"""``bgen plan``: what a run will need, told before it starts: memory, floating-point operations, time, disk.

The module is built here of tensors without memory (device meta), and its passes over a few cells of the store's density
are followed, as a GPU would run them; the rest is arithmetic. Only where no GPU is named, and the model is not larger
than :data:`TIMED`, it is built and run for real, for the speed of this machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import psutil
from rich.console import Group
from rich.table import Table
from torch import Tensor

from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.cpus import cpus
from bgen.errors import UserError, nearest
from bgen.operate.plan_kernels import Passes
from bgen.operate.plan_step import (
    READ_BYTES,
    Cluster,
    StepTime,
    Work,
    advice,
    balanced_cells,
    step_time,
    weak_scaling,
)
from bgen.operate.plan_subject import Subject, matrix_flops_per_s
from bgen.track.devices import DEVICES
from bgen.train.engine.deepspeed_json import BatchPlan, batch_plan
from bgen.train.engine.memory import Memory, host_bytes

MFU = 0.2
"""Share of the peak that is assumed of a model whose kernels cannot be followed."""

WIDE = 4096
"""Cells at which kernels are large."""

FILL = 0.9
"""Share of the memory that the recommended micro batch may take."""

TIMED = 50_000_000
"""Parameters of the largest model that is built and timed where no GPU is named."""


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
    passes
        Both passes of a micro batch on the GPU; None also if they cannot be followed.
    mfu
        Share of the GPU's peak while it computes, as given or by ``passes``.
    scaling
        Hosts, cells/s and share of the speed of one host that each gives, with as many cells a rank.
    balanced
        Cells a rank from which computing takes longer than what the ranks tell each other, and than launches.
    read
        Bytes/s that a host reads.
    host
        Bytes of memory that a host should have for its ranks; what `bgen launch` asks for.
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
    host: int
    step: StepTime | None = None
    passes: Passes | None = None
    mfu: float | None = None
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
            if self.passes is not None:
                ran = self.passes
                facts.add_row(
                    "kernels",
                    f"{ran.launches:,} a micro batch, {_bytes(ran.bytes)} moved: {1000 * ran.seconds:.3g} ms, "
                    f"{1000 * ran.products:.3g} ms of them matrix products; MFU {self.mfu:.0%}",
                )
            facts.add_row("scaling", ", ".join(f"{n} hosts {share:.0%}" for n, _, share in self.scaling[1:]))
            facts.add_row("reading", f"{_bytes(self.read or 0)} a second and host")
        facts.add_row("run", f"{self.hours:.3g} h")
        facts.add_row("host", f"{_bytes(self.host)} of memory, with all its ranks")
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
    mfu: float | None = None,
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
        Share of the GPU's peak that is reached; None: as :mod:`bgen.operate.plan_kernels` estimates it.
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
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu}: a share of the peak, above 0 and at most 1.")
    train, ranks = config.train, nodes * ranks_per_node
    batch = batch_plan(train, ranks)
    subject = Subject(config, genes, tokens)
    trained, frozen, _ = subject.sizes
    timed = gpu is None and trained + frozen <= TIMED
    if timed:
        subject.materialise()
    activations = subject.activations()

    def needs(micro: int, zero: int, offload: bool) -> Memory:
        return subject.memory(micro, activations(micro), ranks, zero, offload)

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
        cells_per_second = nodes * at_once / (subject.seconds() if timed else per_cell / matrix_flops_per_s())
        shared = f", {ranks_per_node} ranks on its {at_once} CPUs" if at_once < ranks_per_node else ""
        speed = f"by a {'pass' if timed else 'matrix product'} on this machine, one thread a rank{shared}"
    else:
        device = DEVICES[gpu]
        wide, peak = 2 if train.precision == "pure_bf16" else 4, device.peak(train.precision)
        passes = subject.passes(batch.micro, device, train.precision, compiled=train.compile)
        launches = passes.launches if passes else 0
        if mfu is None:
            # Of so many cells that kernels are not small, as those of few are bound by their launches anyway.
            many = max(batch.micro, WIDE)
            wider = (
                passes if many == batch.micro else subject.passes(many, device, train.precision, compiled=train.compile)
            )
            mfu = many * per_cell / (wider.seconds * peak) if wider else MFU
        cluster = Cluster(nodes, ranks_per_node, device, network * 1e9 / 8)
        sent = 2 / wide if train.reduce_precision == "bf16" else 1.0
        shape = share, batch.accumulation, train.zero
        work = Work(wide * trained, per_cell, *shape, mfu * peak, launches, sent, trained)
        step = step_time(work, cluster)
        mfu = share * per_cell / (step.compute * peak)
        cells_per_second = step.cells_per_s
        speed = f"{ranks} x {gpu} at {mfu:.0%} of the peak"
        on_gpus = {
            "step": step,
            "passes": passes,
            "mfu": mfu,
            "scaling": weak_scaling(work, cluster),
            "balanced": balanced_cells(work, cluster),
            "read": READ_BYTES * subject.tokens * cells_per_second / nodes,
            "advice": advice(work, cluster, [m.zero for m in table if not m.offload and m.device <= limit]),
        }
    kinds = 3 + (train.ema > 0) + (train.patience > 0)  # weights and two moments, average, best
    checkpoint = 4 * (kinds * trained + frozen)
    return Plan(
        parameters={name: sum(map(Tensor.numel, part.parameters())) for name, part in subject.module.named_children()},
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
        host=host_bytes(chosen, frozen, trained, ranks_per_node, gpu=gpu is not None),
        **on_gpus,
    )


def host_memory(config: Config, *, nodes: int, ranks_per_node: int, gpu: bool) -> int:
    """Return the bytes of memory that a host of a run should have, as :func:`plan` does and quicker.

    Raises
    ------
    UserError
        If the store cannot be opened, or the global batch not divided.
    """
    train, ranks = config.train, nodes * ranks_per_node
    micro = batch_plan(train, ranks).micro
    subject = Subject(config, None, None)
    trained, frozen, _ = subject.sizes
    activations = 0 if gpu else subject.activations()(micro)  # a GPU holds its own
    needed = subject.memory(micro, activations, ranks, train.zero, train.offload.optimizer != "none")
    return host_bytes(needed, frozen, trained, ranks_per_node, gpu=gpu)


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
