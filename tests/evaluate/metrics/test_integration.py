"""Figures of scib-metrics: what separates batches scores low on batches, what loses the types scores low on biology."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.errors import UserError
from bgen.evaluate.metrics.integration import UNINTEGRATED, scib_figures

pytest.importorskip("scib_metrics")


@pytest.mark.slow
def test_each_side_of_an_integration_is_seen() -> None:
    rng = np.random.default_rng(0)
    batch, label = rng.integers(2, size=400), rng.integers(3, size=400)
    types = np.eye(3)[label] * 6
    noise = rng.normal(size=(400, 3))
    shift = np.where(batch == 1, 6.0, -6.0)[:, None]
    embeddings = {UNINTEGRATED: types + noise + shift, "integrated": types + noise, "empty": rng.normal(size=(400, 3))}
    points = {name: values.astype(np.float32) for name, values in embeddings.items()}
    text = batch.astype(str), label.astype(str)
    figures = scib_figures(points, *text)
    assert list(figures)[-1] == "Total"
    total, batches, biology = (figures[name] for name in ("Total", "Batch correction", "Bio conservation"))
    assert total["integrated"] > max(total[UNINTEGRATED], total["empty"]) + 0.1
    assert batches["integrated"] > batches[UNINTEGRATED] + 0.2
    assert biology["integrated"] > biology["empty"] + 0.2
    assert figures == scib_figures(points, *text)
    # Cells without a label do not count.
    with pytest.raises(UserError, match="1 labels"):
        scib_figures(points, text[0], np.where(label == 0, "a", ""))
