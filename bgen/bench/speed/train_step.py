"""``bgen bench train``: how long a training step takes, what it computes and what memory it needs.

The forward pass, backward pass and optimiser step of the velocity network, or of the VAE, are measured on random
inputs, without DeepSpeed and without reading data: the most that a loader could feed.

Axes: B trajectories, T time points, N cells per time point, D latent size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from bgen.config.backbone import BackboneConfig
from bgen.config.run import Config
from bgen.data.batch import CellBatch
from bgen.models.backbones.registry import build_backbone
from bgen.models.vae.vae import VAE
from bgen.track.devices import device_name, peak_flops
from bgen.track.throughput import peak_memory
from bgen.train.engine.compiled import compiled
from bgen.train.engine.parameter_groups import parameter_groups

NONZERO_SHARE = 0.1
"""Share of the genes that a random cell expresses."""


@dataclass(frozen=True)
class Timing:
    """One measurement.

    Attributes
    ----------
    seconds
        Median of a training step.
    cpu_seconds
        Median processor time of a step in this process: the figure to compare where others use the processor too.
    cells_per_s, tflops_per_s
        Of the model; work that is done again under activation checkpointing is not counted.
    mfu
        Share of what the device can do; None on a device whose peak is not known.
    memory_gb
        Peak so far, of the GPU or of the process.
    parameters
        Of the model.
    """

    seconds: float
    cpu_seconds: float
    cells_per_s: float
    tflops_per_s: float
    mfu: float | None
    memory_gb: float
    parameters: int


def bench_train(
    config: Config,
    *,
    device: str = "cpu",
    batch: int | None = None,
    genes: int = 20_000,
    repetitions: int = 5,
) -> dict[str, object]:
    """Measure the training step of a configuration.

    Parameters
    ----------
    config
        Stage, sizes, precision and, for a flow, ``data.trajectories``; no store and no VAE are read.
    device
        "cpu" or "cuda".
    batch
        Cells of a step; default: ``train.micro_batch``, else ``train.global_batch``.
    genes
        Of the VAE, or of a flow on log counts.
    repetitions
        Steps that are timed, after two that are not.

    Returns
    -------
    dict
        What was measured, as JSON.
    """
    cells = batch or config.train.cells_at_a_time or config.train.global_batch
    precision = config.train.precision
    where = torch.device(device)
    if config.stage == "vae":
        timing = time_vae(config, genes, cells, where, repetitions)
        shape: dict[str, int] = {"cells": cells, "genes": genes}
    else:
        trajectories = config.data.trajectories
        T, N = (trajectories.times, trajectories.cells) if trajectories else (1, 1)
        B = max(1, cells // (T * N))
        size = config.vae.latent if config.flow.space == "latent" else genes
        timing = time_backbone(size + 1, config.flow.backbone, (B, T, N), where, precision, repetitions)
        shape = {"B": B, "T": T, "N": N}
    return {"stage": config.stage, "device": device_name(where), "precision": precision, **shape, **asdict(timing)}


def time_backbone(
    size: int,
    config: BackboneConfig,
    shape: tuple[int, int, int],
    device: torch.device,
    precision: str = "float32",
    repetitions: int = 5,
    compile_blocks: bool = False,
) -> Timing:
    """Time a training step of a velocity network on latents ``[B, T, N, D]`` of ``shape`` and ``size`` D."""
    torch.manual_seed(0)
    model = build_backbone(size, config).to(device)
    B, T, N = shape
    z, target = torch.randn(2, B, T, N, size, device=device)
    t, condition = torch.rand(B, T, device=device), torch.randn(B, T, config.width, device=device)
    moments = (config.time.scale * torch.arange(T, device=device)).expand(B, T)

    def loss() -> torch.Tensor:
        return (model(z, t, condition, None, moments).float() - target).square().mean()

    with compiled(model, compile_blocks):
        return _time(model, loss, B * T * N, 3 * model.flops(B, T, N), device, precision, repetitions)


def time_vae(
    config: Config, genes: int, cells: int, device: torch.device, repetitions: int = 5, compile_blocks: bool = False
) -> Timing:
    """Time a training step of a VAE on random sparse counts."""
    torch.manual_seed(0)
    model = VAE(config.vae, genes, {}).to(device)
    expressed = max(1, round(NONZERO_SHARE * genes))
    indices = torch.stack([torch.randperm(genes)[:expressed].sort().values for _ in range(cells)])
    numbers = torch.arange(cells)
    batch = CellBatch(
        torch.arange(cells + 1) * expressed,
        indices.flatten().int(),
        torch.randint(1, 5, (cells * expressed,)).float(),
        genes,
        numbers,
        numbers,
    ).to(device)

    def loss() -> torch.Tensor:
        return model(batch)["loss"].mean()

    with compiled(model, compile_blocks):
        return _time(model, loss, cells, model.training_flops(batch), device, config.train.precision, repetitions)


def _time(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    cells: int,
    flops: int,
    device: torch.device,
    precision: str,
    repetitions: int,
) -> Timing:
    groups = [{k: v for k, v in group.items() if k != "lr_scale"} for group in parameter_groups(model, 0.01)]
    optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, processor = [], []
    for step in range(repetitions + 2):
        _finish(device)
        begin, busy = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32"):
            value = loss()
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        _finish(device)
        if step >= 2:
            seconds.append(time.perf_counter() - begin)
            processor.append(time.process_time() - busy)
    middle = statistics.median(seconds)
    peak = peak_flops(device_name(device), precision)
    return Timing(
        seconds=middle,
        cpu_seconds=statistics.median(processor),
        cells_per_s=cells / middle,
        tflops_per_s=flops / middle / 1e12,
        mfu=None if peak is None else flops / middle / peak,
        memory_gb=peak_memory() / 1e9,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _finish(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
