"""bgen: generative models of gene expression at atlas scale."""

from __future__ import annotations

import importlib
from typing import Any

from bgen import cpus
from bgen.version import __version__

LATER = {"load": ("bgen.tasks.load", "load_model")}
"""Names that are loaded when they are first asked for, since they need torch: name to module and attribute."""

cpus.prepare()  # before torch is loaded, which then reads what it sets

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Load what :data:`LATER` names (PEP 562)."""
    if name not in LATER:
        raise AttributeError(f"module 'bgen' has no attribute '{name}'")
    module, attribute = LATER[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """Return the names that users need."""
    return __all__
