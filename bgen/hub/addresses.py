"""Models that are named by an address: ``hf://owner/name`` at a hub, ``models:/name/version`` in MLflow's registry."""

from __future__ import annotations

from pathlib import Path

from bgen.hub import huggingface
from bgen.hub.huggingface import WANTED
from bgen.track import registry


def is_address(where: object) -> bool:
    """Whether a model is named by an address, not by a folder."""
    return huggingface.is_address(where) or registry.is_address(where)


def fetch(address: str | Path, revision: str | None = None) -> Path:
    """Bring a model onto this machine, and return its folder.

    Raises
    ------
    UserError
        As :func:`bgen.hub.huggingface.fetch` and :func:`bgen.track.registry.fetch`.
    """
    if registry.is_address(address):
        return registry.fetch(address, revision, WANTED)
    return huggingface.fetch(address, revision)
