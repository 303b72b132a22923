from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "multiprocess")]


@pytest.fixture(autouse=True, scope="session")
def _private_extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A lock that a killed build left in the shared folder would stop DeepSpeed for ever."""
    with pytest.MonkeyPatch.context() as patch:
        # Several threads per process only get in each other's way on a busy machine.
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield
