"""``bgen bench train --compare``: what mixes over time, at equal parameters, over lengths and population sizes.

Axes: B trajectories, T time points, N cells per time point, D latent size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bgen.bench.speed.train_step import time_backbone
from bgen.config.backbone import BackboneConfig
from bgen.models.backbones.registry import build_backbone
from bgen.models.backbones.size import backbone_flops, with_parameters
from bgen.nn.scans.published_kernels import missing
from bgen.progress import Progress
from bgen.track.devices import device_name

TIMES = (2, 8, 64, 512, 2048)
CELLS = (1, 32, 256)
LATENT = 17
SIZES = {"cpu": 50_000, "cuda": 10_000_000}
"""Parameters of the networks that are compared, by device."""

PARITY = 3e-2
"""Largest relative difference of fused and plain Mamba-2 in bfloat16 that is taken for rounding."""


def variants(device: str) -> dict[str, dict[str, Any]]:
    """Name the settings of the networks that are compared: alike but for the mixer over time."""
    small = device == "cpu"
    common: dict[str, Any] = {
        "name": "ssm",
        "layers": 1 if small else 4,
        "attention": {"heads": 4 if small else 8},
        "mamba2": {"head_width": 16 if small else 64, "state": 16 if small else 64},
        "hyena": {"max_length": max(TIMES)},
    }
    tokens = {"tokens": 4 if small else 8}

    def over_time(mixer: str, **more: Any) -> dict[str, Any]:
        return {**common, "time": {**tokens, "mixer": mixer, "real_time": mixer != "hyena"}, **more}

    found = {mixer: over_time(mixer) for mixer in ("mamba2", "s4d", "hyena", "attention")}
    if device == "cuda":
        mamba2 = common["mamba2"]
        found["mamba2"] = over_time("mamba2", mamba2={**mamba2, "backend": "torch"})
        if missing("mamba2") is None:
            found["mamba2 fused"] = over_time("mamba2", mamba2={**mamba2, "backend": "fused"})
    else:
        found["mamba1"] = over_time("mamba1")
    return found


def compare(
    out: Path,
    *,
    device: str = "cpu",
    times: Sequence[int] = TIMES,
    cells: Sequence[int] = CELLS,
    limit: float = 20.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time one trajectory of every length and population size for every mixer; write ``train.json`` and ``train.png``.

    Parameters
    ----------
    out
        Folder for both.
    device
        "cpu" (float32) or "cuda" (bfloat16, after fused and plain Mamba-2 were found to agree in it).
    limit
        Seconds that one step may take; what would take longer, by its operations and the speed so far, is left out.

    Returns
    -------
    dict
        The content of ``train.json``; what was left out has ``seconds`` None.
    """
    where = torch.device(device)
    precision = "float32" if device == "cpu" else "bf16"
    clock = "cpu_seconds" if device == "cpu" else "seconds"
    step = 8 if device == "cpu" else 32
    configs = {
        name: with_parameters(LATENT, settings, SIZES[device], step) for name, settings in variants(device).items()
    }
    result: dict[str, Any] = {
        "device": device_name(where),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "clock": clock,
        "torch": torch.__version__,
        "parity": bf16_parity(configs["mamba2 fused"], where) if "mamba2 fused" in configs else None,
        "rows": [],
    }
    done = 0
    for name, config in configs.items():
        for N in cells:
            speed = None  # operations a second at the length before
            for T in sorted(times):
                flops = 3 * backbone_flops(LATENT, config, 1, T, N)
                row: dict[str, Any] = {"mixer": name, "T": T, "N": N, "width": config.width, "flops": flops}
                if speed is not None and flops / speed > limit:
                    row["seconds"] = None
                else:
                    begin = time.perf_counter()
                    repetitions = 5 if speed is None or flops / speed < limit / 20 else 1
                    timing = time_backbone(LATENT, config, (1, T, N), where, precision, repetitions)
                    speed = flops / getattr(timing, clock)
                    row |= {**timing.__dict__, "spent": time.perf_counter() - begin}
                result["rows"].append(row)
                done += 1
                if progress:
                    progress("timing", done, len(configs) * len(cells) * len(times))
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(result, out / "train.png")
    return result


def bf16_parity(config: BackboneConfig, device: torch.device) -> dict[str, float]:
    """Compare fused and plain Mamba-2 under bfloat16 autocast: relative differences of outputs and gradients.

    Raises
    ------
    RuntimeError
        If they differ by more than :data:`PARITY`: then nothing that the fused kernels compute can be trusted here.
    """
    models = []
    for backend in ("fused", "torch"):
        torch.manual_seed(0)
        settings = config.model_dump()
        settings["mamba2"]["backend"] = backend
        model = build_backbone(LATENT, BackboneConfig.model_validate(settings)).to(device)
        with torch.no_grad():  # layers that start at zero hide their input
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    z, t = torch.randn(2, 100, 8, LATENT, device=device), torch.rand(2, 100, device=device)
    condition = torch.randn(2, 100, config.width, device=device)
    outputs = []
    for model in models:
        with torch.autocast(device.type, torch.bfloat16):
            outputs.append(model(z, t, condition, None, None).float())
        outputs[-1].square().mean().backward()
    found = {"outputs": _difference(*outputs)}
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in models]
    found["gradients"] = _difference(*gradients)
    if max(found.values()) > PARITY:
        raise RuntimeError(f"fused and plain Mamba-2 differ in bfloat16: {found}; do not train with backend fused here")
    return found


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw seconds per step over T, a panel for every N, with lines that grow as T and as T squared.

    On a CPU they are of processor time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["seconds"] is not None]
    clock = result["clock"]
    sizes = sorted({row["N"] for row in rows})
    figure = Figure(figsize=(4.2 * len(sizes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for panel, N in zip(panels, sizes, strict=True):
        for name in dict.fromkeys(row["mixer"] for row in rows):
            line = [(row["T"], row[clock]) for row in rows if row["mixer"] == name and row["N"] == N]
            panel.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name)
        here = [row for row in rows if row["N"] == N]
        last, top = max(row["T"] for row in here), max(row[clock] for row in here)
        for power, style in ((1, ":"), (2, "--")):
            start = max(last / 16, 2)
            panel.plot(
                [start, last], [top * (start / last) ** power, top], style, color="0.6", label=f"grows as T^{power}"
            )
        panel.set(xscale="log", yscale="log", xlabel="time points, T", title=f"{N} cell{'s' * (N > 1)} per time point")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(f"{clock.replace('_', ' ')} per training step")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"A training step on one trajectory, equal parameters: {result['device']}, {result['precision']}")
    figure.savefig(path, dpi=110)
