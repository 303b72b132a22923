"""bgen: generative models of gene expression at atlas scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from bgen.tasks.anndata_model import Model

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(directory: str | Path, device: str = "cpu") -> Model:
    """Load an exported model directory (see :func:`bgen.tasks.anndata_model.load_model`)."""
    from bgen.tasks.anndata_model import load_model

    return load_model(directory, device)
