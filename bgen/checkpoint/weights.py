"""Weights in a checkpoint as safetensors: readable without DeepSpeed, and without unpickling anything."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from bgen.checkpoint import files
from bgen.config.errors import UserError


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write a state dict; each tensor is copied first, because safetensors refuses shared storage."""
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict that :func:`write_weights` wrote, on the CPU."""
    return load_file(path)


def export_weights(root: Path) -> tuple[dict[str, Tensor], Path]:
    """The weights to export of the newest undamaged checkpoint below ``root``, and that checkpoint's folder.

    The best ones where the run keeps them, else the moving average, else the last.

    Raises
    ------
    UserError
        If there is no usable checkpoint.
    """
    messages = []
    for folder in files.committed(root):
        found = files.damage(folder)
        if found is None:
            best = folder / files.BEST
            return read_weights(best if best.exists() else folder / files.MODEL), folder
        messages.append(f"{folder.name} is damaged ({found})")
    raise UserError(f"No usable checkpoint in {root}. {'; '.join(messages) or 'There is none.'}")
