"""``bgen bench gpu``: the first minutes on a card. Is what it computes right, how fast is it, and what does it hold?

1. **Parity**: the kernels, and a network of every mixer, in float32 and in bfloat16, against
   the same in float64 on the CPU: values and gradients, as the norm of the difference over the norm.
2. **Steps**: the training step of VAE, flow, trajectories and perturbations in the sizes of configs/sizes, beside what
   the card could do at most (MFU), as written and compiled. A batch that does not fit is halved.
3. **Sampling**: cells a second, from noise to counts.
4. **Loading**: cells a second from a store on this disk to CSR batches on the device.
5. **Mixers** over time points and cells (:mod:`bgen.bench.speed.mixers`).

What was measured is written after every line, so that nothing is lost to an error or to the end of a machine's time;
what there is no time for is named. On a CPU the same lines run in small, so that only the speed is new on a card.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from bgen.bench.loaders.atlas import Atlas
from bgen.bench.speed.mixers import LATENT, compare, variants
from bgen.bench.speed.operators import Pair, compare_dropout, compare_first_layer, compare_set_read, compare_thinning
from bgen.bench.speed.train_step import Timing, time_backbone, time_vae
from bgen.config.backbone import BackboneConfig
from bgen.config.flow import FlowConfig, SampleConfig
from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader, TrainLoader
from bgen.errors import UserError
from bgen.files import write_result
from bgen.models.backbones.registry import build_backbone
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.likelihoods import fused
from bgen.models.likelihoods.negative_binomial import NegativeBinomial, ZeroInflatedNegativeBinomial
from bgen.models.vae.vae import VAE
from bgen.order.keys import hash_keys
from bgen.progress import Say
from bgen.store.store import Store
from bgen.track.devices import device_name
from bgen.version import __version__
from data_tools.building.write import write_store

BOUNDS = {"float32": 1e-3, "bf16": 5e-2}
"""Largest relative difference that is taken for rounding; products in float32 may be those of TF32."""

STAGES = {"vae": "vae", "flow": "flow", "trajectories": "trajectories", "perturbation": "perturbation"}


@dataclass(frozen=True)
class Extent:
    """How much is measured: sizes of configs/sizes, cells of a step, genes, cells sampled and read, T, N of mixers."""

    sizes: tuple[str, ...] = ("small", "base", "large")
    cells: int = 4096
    genes: int = 20_000
    sampled: int = 20_000
    read: int = 100_000
    times: tuple[int, ...] = (2, 8, 64, 512, 2048)
    populations: tuple[int, ...] = (1, 32)
    repetitions: int = 5
    compiled: bool = True


IN_SMALL = Extent(("tiny",), 64, 300, 100, 1000, (2, 8), (1,), 1, compiled=False)
"""For a CPU."""


@dataclass
class Measured:
    """What ``bgen bench gpu`` found.

    Attributes
    ----------
    about
        Device, versions.
    parity
        Rows of ``what``, ``precision``, ``values``, ``gradients`` (relative differences) and ``agrees``.
    steps
        Rows of ``stage``, ``size``, ``compiled``, ``cells``, and the figures of :class:`Timing`, or ``failed``.
    sampling, loading
        Rows of ``size`` or ``profile``, and ``cells_per_s``.
    mixers
        The content of ``train.json`` of :func:`bgen.bench.speed.mixers.compare`, if there was time.
    left_out
        What there was no time for.
    """

    about: dict[str, Any]
    parity: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    sampling: list[dict[str, Any]] = field(default_factory=list)
    loading: list[dict[str, Any]] = field(default_factory=list)
    mixers: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether all that was compared is the same but for rounding."""
        return all(row["agrees"] for row in self.parity)

    def tables(self) -> Group:
        """What the command shows."""
        parity = Table(title="against float64 on the CPU", title_justify="left")
        for name in ("what", "precision", "values", "gradients", ""):
            parity.add_column(name)
        for row in self.parity:
            figures = (f"{row['values']:.1e}", f"{row['gradients']:.1e}")
            parity.add_row(row["what"], row["precision"], *figures, "" if row["agrees"] else "DIFFERS")
        steps = Table(title=f"training step, {self.about['precision']}", title_justify="left")
        for name in ("stage", "size", "compiled", "cells", "ms", "cells/s", "TFLOP/s", "MFU", "memory"):
            steps.add_column(name, justify="left" if name in ("stage", "size") else "right")
        for row in self.steps:
            said = (row["stage"], row["size"], "yes" if row["compiled"] else "")
            if "failed" in row:
                steps.add_row(*said, row["failed"])
                continue
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            speed = (f"{1000 * row['seconds']:.1f}", f"{row['cells_per_s']:,.0f}", f"{row['tflops_per_s']:.3g}", mfu)
            steps.add_row(*said, str(row["cells"]), *speed, f"{row['memory_gb']:.1f} GB")
        rates = Table(title="cells a second", title_justify="left", show_header=False)
        for row in self.sampling:
            rates.add_row(f"sampling, {row['size']}, {row['steps']} steps", f"{row['cells_per_s']:,.0f}")
        for row in self.loading:
            rates.add_row(f"loading, profile {row['profile']}", f"{row['cells_per_s']:,.0f}")
        parts: list[Any] = [parity, steps, rates]
        if self.left_out:
            parts.append(f"No time was left for: {', '.join(self.left_out)}.")
        return Group(*parts)


def bench_gpu(
    out: Path, *, device: str = "cuda", minutes: float = 8.0, extent: Extent | None = None, say: Say = lambda text: None
) -> Measured:
    """Measure, and write ``gpu.json``, ``gpu.png`` and ``mixers/`` into ``out``.

    Parameters
    ----------
    device
        "cuda" or "cpu".
    minutes
        After so many nothing new is begun.
    extent
        How much is measured; None: by the device.

    Raises
    ------
    UserError
        If there is no such device here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here. --device cpu runs the same lines in small.")
    extent = extent or (Extent() if device == "cuda" else IN_SMALL)
    where = torch.device(device)
    precision = "bf16" if device == "cuda" else "float32"
    about = {
        "device": device_name(where),
        "precision": precision,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "version": __version__,
        "fused likelihoods": fused.usable(torch.empty(0, device=where)),
    }
    found, end = Measured(about), time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    for name, work in _works(found, where, precision, extent, out):
        if time.monotonic() > end:
            found.left_out.append(name)
        else:
            say(name)
            work()
        write_result(out / "gpu.json", json.dumps(found.__dict__, indent=1, allow_nan=False) + "\n")
    draw(found, out / "gpu.png")
    return found


def _works(
    found: Measured, device: torch.device, precision: str, extent: Extent, out: Path
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what is to be measured, the most important first, each with its name."""
    yield "parity of likelihoods", lambda: found.parity.extend(_likelihoods(device, extent))
    sizes = min(extent.cells, 256), extent.genes
    batch = _csr(_counts(*sizes))
    operators = {
        "dropout": compare_dropout(device, *sizes),
        "thinning": compare_thinning(device, batch),
        "first layer": compare_first_layer(device, batch, 128),
        "set read": compare_set_read(device, batch, 64),
    }
    for operator, pairs in operators.items():
        yield f"parity of {operator}", lambda pairs=pairs: found.parity.extend(map(_pair, pairs))  # type: ignore[misc]
    for mixer in variants(device.type):
        yield f"parity of {mixer}", lambda mixer=mixer: found.parity.extend(_network(mixer, device))  # type: ignore[misc]
    for compiled in (False, True) if extent.compiled else (False,):
        for size in extent.sizes:
            for stage in STAGES:
                name = f"step of {stage}, {size}{', compiled' if compiled else ''}"
                yield (
                    name,
                    lambda s=stage, z=size, c=compiled: found.steps.append(_step(s, z, c, device, precision, extent)),  # type: ignore[misc]
                )
        if not compiled:
            for size in extent.sizes:
                yield f"sampling, {size}", lambda size=size: found.sampling.append(_sampling(size, device, extent))  # type: ignore[misc]
            for profile in ("small", "fast"):
                yield (
                    f"loading, {profile}",
                    lambda p=profile: found.loading.append(_loading(p, device, extent)),  # type: ignore[misc]
                )

    def mixers() -> None:
        of = extent.times, extent.populations
        found.mixers = compare(out / "mixers", device=device.type, times=of[0], cells=of[1], limit=2.0)

    yield "mixers", mixers


def _likelihoods(device: torch.device, extent: Extent) -> Iterator[dict[str, Any]]:
    """Compare both likelihoods with the textbook formula, of logits in float32 and in bfloat16."""
    cells, genes = min(extent.cells, 256), extent.genes
    g = torch.Generator().manual_seed(0)
    counts = _counts(cells, genes)
    logits, dropout = (torch.randn(cells, genes, generator=g) for _ in range(2))
    log_theta = torch.linspace(-3, 6, genes)
    batch = _csr(counts).to(device)
    for kind, name in ((NegativeBinomial, "negative binomial"), (ZeroInflatedNegativeBinomial, "zero-inflated")):
        for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            given = [logits.to(dtype), log_theta, dropout.to(dtype)][: 3 if kind is ZeroInflatedNegativeBinomial else 2]
            exact = [t.detach().double().requires_grad_() for t in given]
            here = [t.detach().to(device, copy=True).requires_grad_() for t in given]
            expected = _of(kind, exact, counts).log_prob(counts.double()).sum(1)
            values = _of(kind, here, counts.to(device)).log_prob_sparse(batch)
            expected.sum().backward()
            values.sum().backward()
            yield _row(name, precision, (values, expected), zip(here, exact, strict=True))


def _counts(cells: int, genes: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.rand(cells, genes, generator=g) * 3, generator=g)
    return counts * (torch.rand(cells, genes, generator=g) < 0.1)


def _of(kind: type[NegativeBinomial], tensors: list[Tensor], counts: Tensor) -> NegativeBinomial:
    logits, log_theta, *dropout = tensors
    return kind(logits, counts.sum(1), log_theta, *dropout)


def _csr(counts: Tensor) -> CellBatch:
    rows, genes = counts.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts != 0).sum(1).cumsum(0)))
    numbers = torch.arange(len(counts))
    return CellBatch(indptr, genes.int(), counts[rows, genes], counts.shape[1], numbers, numbers)


def _network(mixer: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare a small network with itself in float64 on the CPU, where there are no kernels."""
    settings = {**variants(device.type)[mixer], "width": 128, "layers": 2}
    exact_settings = json.loads(json.dumps(settings))
    exact_settings.setdefault("mamba2", {})["backend"] = "torch"
    torch.manual_seed(0)
    exact = build_backbone(LATENT, BackboneConfig.model_validate(exact_settings)).double()
    with torch.no_grad():  # layers that start at zero hide their input
        for parameter in exact.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    B, T, N = 2, 33, 4
    inputs = torch.randn(B, T, N, LATENT), torch.rand(B, T), torch.randn(B, T, 128)
    expected = exact(*(x.double() for x in inputs))
    expected.square().mean().backward()
    for precision in ("float32", "bf16"):
        network = build_backbone(LATENT, BackboneConfig.model_validate(settings)).to(device)
        network.load_state_dict(exact.state_dict())
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            values = network(*(x.to(device) for x in inputs)).float()
        values.square().mean().backward()
        pairs = list(zip(network.parameters(), exact.parameters(), strict=True))
        yield _row(mixer, precision, (values, expected), [_gradients(pairs)])


def _gradients(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> tuple[Tensor, Tensor]:
    """Return all gradients as one tensor with a gradient, of both sides."""
    sides = []
    for side in zip(*pairs, strict=True):
        whole = torch.zeros(sum(p.numel() for p in side), dtype=torch.float64)
        parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().cpu() for p in side]
        whole.grad = torch.cat([part.double() for part in parts])
        sides.append(whole)
    return sides[0], sides[1]


def _pair(pair: Pair) -> dict[str, Any]:
    return _row(pair.what, pair.precision, pair.values, pair.gradients)


def _row(what: str, precision: str, values: tuple[Tensor, Tensor], pairs: Any) -> dict[str, Any]:
    gradients = max((_difference(mine.grad, exact.grad) for mine, exact in pairs), default=0.0)
    figures = {"values": _difference(*values), "gradients": gradients}
    agrees = all(np.isfinite(f) and f < BOUNDS[precision] for f in figures.values())
    return {"what": what, "precision": precision, **figures, "agrees": bool(agrees)}


def _difference(mine: Tensor, exact: Tensor) -> float:
    mine = mine.detach().cpu().double()
    exact = exact.detach().cpu().double()
    return float((mine - exact).norm() / exact.norm())


def _configured(stage: str, size: str) -> Config:
    """Return the shipped configuration of a stage in a size."""
    of_cells = f"sizes/cells/{size}" if stage == "flow" else f"sizes/{size}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "size.yaml")
        file.write_text(f"extends: [{STAGES[stage]}, {of_cells}]\n", encoding="utf-8")
        return load_config(file)


def _step(
    stage: str, size: str, compiled: bool, device: torch.device, precision: str, extent: Extent
) -> dict[str, Any]:
    """Time a training step; half as many cells where memory is not enough."""
    config = _configured(stage, size)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    cells, said = extent.cells, {"stage": stage, "size": size, "compiled": compiled}
    while True:
        try:
            timing = _timed(config, cells, device, precision, extent, compiled)
            return {**said, "cells": round(timing.cells_per_s * timing.seconds), **timing.__dict__}
        except torch.cuda.OutOfMemoryError:
            if cells <= 32:
                return {**said, "failed": f"out of memory with {cells} cells"}
            cells //= 2
        except Exception as error:  # of a compiler, a kernel, a driver: the other lines are still worth having
            return {**said, "failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _timed(config: Config, cells: int, device: torch.device, precision: str, extent: Extent, compiled: bool) -> Timing:
    if config.stage == "vae":
        return time_vae(config, extent.genes, cells, device, extent.repetitions, compiled)
    trajectories = config.data.trajectories
    T, N = (trajectories.times, trajectories.cells) if trajectories else (1, 1)
    shape = max(1, cells // (T * N)), T, N
    size = config.vae.latent + 1
    return time_backbone(size, config.flow.backbone, shape, device, precision, extent.repetitions, compiled)


@torch.no_grad()
def _sampling(size: str, device: torch.device, extent: Extent) -> dict[str, Any]:
    """Cells a second of an untrained flow with its VAE, from noise to counts."""
    config = _configured("flow", size)
    vae = VAE(config.vae, extent.genes, {})
    settings = FlowConfig.model_validate({"vae": "none", "conditions": [], "backbone": config.flow.backbone})
    flow = LatentFlow(settings, vae, {}, {}, {}).to(device).eval()
    sample = SampleConfig(steps=4)
    keys = torch.from_numpy(hash_keys(0, np.arange(extent.cells)).view(np.int64)).to(device)
    seconds: list[float] = []
    made = 0
    while made < extent.sampled or len(seconds) < 2:
        _finish(device)
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z, log_library = flow.vae.unwhiten(flow.sample({}, extent.cells, keys, sample))
            flow.vae.decode(z, log_library.clamp(0, 10).exp(), {}).sample(keys)
        _finish(device)
        seconds.append(time.perf_counter() - begin)
        made += extent.cells
    rate = extent.cells / statistics.median(seconds[1:])  # the first is to warm up
    return {"size": size, "steps": sample.steps, "cells": extent.cells, "cells_per_s": rate}


def _loading(profile: str, device: torch.device, extent: Extent) -> dict[str, Any]:
    """Cells a second from a store on this disk (its files in the page cache) to CSR batches on the device."""
    atlas = Atlas(cells=extent.read, genes=extent.genes)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder, "store"), atlas.contents(), profile=profile, seed=0, created_by=f"bgen {__version__}")
        store = Store(Path(folder, "store"))
        order = store.order("train", batch=min(extent.cells, extent.read // 4), lanes=8, window=16, seed=0)
        loader = TrainLoader(CountReader(store), order, seed=0)
        cells, begin = 0, None
        for step, (packed,) in enumerate(loader.packed_steps()):
            batch = packed.to(device).to_csr()
            if step == 1:  # the first is to warm up
                _finish(device)
                begin = time.perf_counter()
            elif begin is not None:
                cells += len(batch)
                if cells >= extent.read:
                    break
        _finish(device)
        assert begin is not None
        return {"profile": profile, "cells": cells, "cells_per_s": cells / (time.perf_counter() - begin)}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(found: Measured, path: Path) -> None:
    """Draw cells a second of every training step, by stage and size; MFU stands at the bars where it is known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in found.steps if "failed" not in row]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(3.2 * max(1, len(stages)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, stage in zip(figure.subplots(1, max(1, len(stages)), squeeze=False)[0], stages, strict=False):
        here = [row for row in rows if row["stage"] == stage]
        names = [row["size"] + ("\ncompiled" if row["compiled"] else "") for row in here]
        bars = panel.bar(names, [row["cells_per_s"] for row in here])
        panel.bar_label(bars, ["" if row["mfu"] is None else f"MFU {row['mfu']:.0%}" for row in here], fontsize=8)
        panel.set(yscale="log", title=stage)
    figure.supylabel("cells a second")
    figure.suptitle(f"Training steps: {found.about['device']}, {found.about['precision']}")
    figure.savefig(path, dpi=110)
