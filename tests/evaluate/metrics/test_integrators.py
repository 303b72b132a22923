"""Other tools beside an integration, where they are installed: each takes the batch away, and cells keep their rows."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.evaluate.metrics.integrators import other_integrations
from bgen.evaluate.metrics.mixing import batch_mixing

INSTALLED = {
    name for name, package in {"Harmony": "harmonypy", "scVI": "scvi"}.items() if importlib.util.find_spec(package)
}


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="neither harmonypy nor scvi-tools is installed")
def test_other_tools_take_the_batch_away_and_keep_the_types() -> None:
    rng = np.random.default_rng(0)
    batch, label = rng.integers(2, size=400), rng.integers(3, size=400)
    rate = np.exp(rng.normal(size=(3, 60)))[label] * np.exp(0.7 * rng.normal(size=(2, 60)))[batch]
    counts = sp.csr_matrix(rng.poisson(5 * rate).astype(np.float32))
    components = (np.eye(3)[label] * 6 + rng.normal(size=(400, 3)) + 2.0 * batch[:, None]).astype(np.float32)
    found = other_integrations(counts, components, batch.astype(str))
    assert set(found) == INSTALLED
    for points in found.values():
        assert points.shape[0] == 400
        assert batch_mixing(points, batch) > batch_mixing(components, batch) + 0.1
        centres = np.stack([points[label == kind].mean(0) for kind in range(3)])
        nearest = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        assert (nearest == label).mean() > 0.9


def test_without_them_there_is_nothing_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert other_integrations(sp.csr_matrix((4, 3)), np.zeros((4, 2), np.float32), np.array(["a"] * 4)) == {}
