"""bgen: generative models of gene expression at atlas scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bgen import cpus

if TYPE_CHECKING:
    from pathlib import Path

    from bgen.tasks.model import Model

cpus.prepare()  # before torch is loaded, which then reads what it sets

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(directory: str | Path, device: str = "cpu") -> Model:
    """Load an exported model directory (see :func:`bgen.tasks.model.load_model`)."""
    from bgen.tasks.model import load_model

    return load_model(directory, device)
