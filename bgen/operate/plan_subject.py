"""What `bgen plan` looks at: the module that a configuration would train, and passes over cells like the store's."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from bgen.config.flow import FlowConfig, MemberSizes
from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.errors import UserError, nearest
from bgen.hub.contents import without_memory
from bgen.hub.directory import read_vae_settings
from bgen.models.codec import Codec
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.log_counts import LogCounts
from bgen.models.vae.vae import VAE
from bgen.nn.memory import activation_bytes
from bgen.operate.plan_kernels import Passes, follow
from bgen.store.format.manifest import Manifest
from bgen.store.open import open_data
from bgen.track.devices import Device
from bgen.train.engine.memory import Memory, memory
from bgen.train.stages.members import label_sets

PROBE = (8, 32)
"""Cells of the two forward passes from which the activations of a micro batch are extrapolated."""

Seen = TypeVar("Seen")


class Subject:
    """The module that would be trained, without memory until it is materialised, and cells like the store's."""

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
        self._manifest = manifest
        self.codec: Codec
        self.module: VAE | LatentFlow
        self.device = torch.device("meta")
        try:
            with without_memory():
                self._build()
            self.module.to(self.device)  # what was made of arrays has values
        except RuntimeError:  # of a part that reads numbers as it is made
            self.materialise()

    def materialise(self) -> None:
        """Build the module for real, on the CPU."""
        self.device = torch.device("cpu")
        self._build()

    def _build(self) -> None:
        config, manifest = self.config, self._manifest
        if config.stage == "vae" or config.flow.space == "latent":
            self.codec = self.module = VAE(*self._vae(manifest))
        else:
            self.codec = LogCounts(config.flow.log_counts, self.genes)
        if config.stage == "flow":
            categories = _categories(config.flow.conditions, manifest)
            self.module = LatentFlow(config.flow, self.codec, categories, {}, _sets(config.flow, manifest, self.genes))
        self.module.train()

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Return the numbers of parameters: trained, frozen, and of the largest that is trained."""
        trained = [p.numel() for p in self.module.parameters() if p.requires_grad]
        every = sum(p.numel() for p in self.module.parameters())
        return sum(trained), every - sum(trained), max(trained, default=0)

    def memory(self, micro: int, activations: int, ranks: int, zero: int, offload: bool) -> Memory:
        """Return the memory of a rank at a micro batch with so many bytes of activations."""
        trained, frozen, largest = self.sizes
        given = {"trained": trained, "frozen": frozen, "largest": largest, "activations": activations}
        train = self.config.train.model_copy(update={"micro_batch": micro})
        return memory(train, ranks=ranks, zero=zero, offload=offload, **given)

    def _vae(self, manifest: Manifest | None) -> tuple[VAEConfig, int, dict[str, int]]:
        """What the VAE is built from; under a flow, the settings of the trained VAE if it is there."""
        config, path = self.config, self.config.flow.vae
        if config.stage == "flow" and path is not None:
            for folder in (path, path / "model"):
                if (folder / "config.json").is_file():
                    return read_vae_settings(folder)
            if (path / "config.yaml").is_file():
                config = load_config(path / "config.yaml")
        return config.vae, self.genes, _categories(config.vae.covariates, manifest)

    def activations(self) -> Callable[[int], int]:
        """Return the bytes of activations as a function of the micro batch."""
        few, many = PROBE
        sizes = [self._followed(partial(self._activation_bytes, cells)) for cells in (few, few, many)]
        slope = max(0.0, (sizes[2] - sizes[1]) / (many - few))  # the first is to warm up
        fixed = max(0.0, sizes[1] - slope * few)
        return lambda micro: round(fixed + slope * micro)

    def _activation_bytes(self, cells: int) -> int:
        step, inputs = self._step(cells)
        return activation_bytes(step, [*self.module.parameters(), *self.module.buffers(), *inputs])

    def seconds(self) -> float:
        """Return the seconds per cell of both passes on one thread of this machine."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            step, _ = self._step(PROBE[1])
            begin = time.perf_counter()
            step().backward()
            seconds = (time.perf_counter() - begin) / PROBE[1]
        finally:
            torch.set_num_threads(threads)
        self.module.zero_grad(set_to_none=True)
        return seconds

    def passes(self, cells: int, device: Device, precision: str, *, compiled: bool) -> Passes | None:
        """What a GPU does in both passes over a micro batch (:func:`bgen.operate.plan_kernels.follow`).

        Of the network alone, if what goes before it asks for values; None if it does, too, or was built for real.
        """
        if self.device.type != "meta":
            return None
        for step in (self._whole_step, lambda cells: self._step(cells)[0]):
            try:
                return follow(step(cells), self.module, device, precision, compiled=compiled)
            except (RuntimeError, TypeError):
                self.module.zero_grad(set_to_none=True)
        return None

    def _whole_step(self, cells: int) -> Callable[[], Tensor]:
        """Return a forward pass on so many cells, with all that goes before the network."""
        trajectories = self.config.data.trajectories
        if not isinstance(self.module, LatentFlow) or trajectories is None:
            batch = self._batch(cells, drawn=False).to(self.device)
            return lambda: self.module(batch)["loss"].mean()
        T, N = trajectories.times, trajectories.cells
        B = max(1, cells // (T * N))
        with self.device:
            mask, time = torch.ones(B, T, N, dtype=torch.bool), torch.arange(float(T)).expand(B, T).contiguous()
            control = torch.zeros(B, T, dtype=torch.bool)
        course = TrajectoryBatch.of(self._batch(B * T * N, drawn=False).to(self.device), mask, time, control)
        return lambda: self.module(course)["loss"].mean()

    def _followed(self, look: Callable[[], Seen]) -> Seen:
        """Look at passes: of a real model, if they ask for values, which one without memory does not have."""
        try:
            return look()
        except (RuntimeError, TypeError):
            if self.device.type != "meta":
                raise
            self.materialise()
            return look()

    def _step(self, cells: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """Return a forward pass on so many cells, and its inputs."""
        if not isinstance(self.module, LatentFlow) or self.config.data.trajectories is None:
            batch = self._batch(cells).to(self.device)
            inputs = [batch.indptr, batch.indices, batch.counts, batch.keys, batch.cells, *batch.obs.values()]
            return lambda: self.module(batch)["loss"].mean(), inputs
        T, N = self.config.data.trajectories.times, self.config.data.trajectories.cells
        B = max(1, round(cells / (T * N)))
        with self.device:
            z, t = torch.randn(B, T, N, self.module.size), torch.rand(B, T)
            condition = torch.randn(B, T, self.config.flow.backbone.width)
            mask, when = torch.ones(B, T, N, dtype=torch.bool), torch.arange(float(T)).expand(B, T).contiguous()
        backbone = self.module.backbone
        # As if of `cells` cells, so that the line through two measurements is that of cells.
        return lambda: backbone(z, t, condition, mask, when).square().mean() * (cells / (B * T * N)), [z, t, condition]

    def _batch(self, cells: int, *, drawn: bool = True) -> CellBatch:
        """Cells with the store's mean number of expressed genes, which are drawn at random or the same for all."""
        generator = torch.Generator().manual_seed(0)
        n = min(self.genes, max(1, round(self.tokens)))
        if drawn:
            rows = [torch.randperm(self.genes, generator=generator)[:n].sort().values for _ in range(cells)]
        else:
            rows = [torch.arange(n)] * cells
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


def matrix_flops_per_s() -> float:
    """Floating-point operations a second of matrix products on one thread of this machine."""
    size, times = 512, 8
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.ones(size, size)
        a @ a  # the first one also makes the threads
        begin = time.perf_counter()
        for _ in range(times):
            a @ a
        return times * 2 * size**3 / (time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
