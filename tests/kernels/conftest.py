"""Triton kernels on a CPU, through Triton's interpreter; skipped where that is not set up."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch


def _reason(needed: tuple[str, ...]) -> str | None:
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if torch.cuda.is_available():
        return None
    if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("MAMBA_DETERMINISTIC") != "1":
        return "the kernels run on a CPU only with TRITON_INTERPRET=1 MAMBA_DETERMINISTIC=1 set"
    return None


@pytest.fixture(autouse=True)
def kernels_run_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip, or let the kernels' launchers believe that there is a device to choose."""
    if (reason := _reason(request.module.NEEDED)) is not None:
        pytest.skip(reason)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        processors = SimpleNamespace(multi_processor_count=4)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    torch.set_num_threads(1)
