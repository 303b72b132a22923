from __future__ import annotations

import pytest

from bgen.bench.loaders.atlas import Atlas


@pytest.fixture(scope="session")
def atlas() -> Atlas:
    """3,000 cells of an atlas of the default size; its table of means takes seconds, once."""
    return Atlas(cells=3000)
