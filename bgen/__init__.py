"""bgen: generative models of gene expression at atlas scale."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bgen import cpus
from bgen.version import __version__

if TYPE_CHECKING:  # what editors and type checkers see
    from bgen import plot
    from bgen.api.data import build, check
    from bgen.api.train import train_flow, train_perturbation, train_trajectories, train_vae
    from bgen.tasks.load import load_model as load

LATER = {
    "load": ("bgen.tasks.load", "load_model"),
    "check": ("bgen.api.data", "check"),
    "build": ("bgen.api.data", "build"),
    "train_vae": ("bgen.api.train", "train_vae"),
    "train_flow": ("bgen.api.train", "train_flow"),
    "train_trajectories": ("bgen.api.train", "train_trajectories"),
    "train_perturbation": ("bgen.api.train", "train_perturbation"),
    "plot": ("bgen.plot", ""),
}
"""Names that are loaded when they are first asked for, since they need torch: name to module and attribute."""

cpus.prepare()  # before torch is loaded, which then reads what it sets

__all__ = [
    "__version__",
    "build",
    "check",
    "load",
    "plot",
    "train_flow",
    "train_perturbation",
    "train_trajectories",
    "train_vae",
]


def __getattr__(name: str) -> Any:
    """Load what :data:`LATER` names (PEP 562)."""
    if name not in LATER:
        raise AttributeError(f"module 'bgen' has no attribute '{name}'")
    module, attribute = LATER[name]
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    """Return the names that users need."""
    return __all__
