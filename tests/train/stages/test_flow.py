"""A flow of single cells: what it says of a network that mixes what single cells do not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ("{name: mlp, width: 16, layers: 1}", None),
        ("{name: hybrid, pattern: [none], width: 16, layers: 1}", None),
        ("{name: hybrid, width: 16, layers: 1, time: {tokens: 2}, mamba2: {head_width: 8}}", "time and cells"),
        ("{name: transformer, width: 16, layers: 1}", "cells"),
    ],
)
def test_mixing_that_single_cells_have_no_use_for_is_told(
    backbone: str, told: str | None, bgen: Any, demo: Any, tmp_path: Path
) -> None:
    settings = ["train.steps=1", "train.global_batch=32", "train.eval_every=0", "flow.fit_levels=false"]
    settings += [f"data.store={demo.store}", f"flow.vae={demo.vae}", f"flow.backbone={backbone}", f"out={tmp_path}/run"]
    done = bgen("train", "demo/flow", *settings, "track.mlflow=false", "track.progress=false")
    assert done.code == 0, done
    assert (f"mixes over {told}," in done.err) == (told is not None)
    assert ("single cells" in done.err) == (told is not None)
