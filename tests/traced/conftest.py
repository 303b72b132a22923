from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the test, torch believes in a CUDA device, and what waits by permission is stood in for."""
    from on_cuda import on_cuda
    from waits import allow

    allow(monkeypatch)
    with on_cuda(monkeypatch):
        yield
