"""A model over time answers interpolate, forecast and generate with every backbone, from noise and from neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bgen.config.backbone import BackboneConfig
from bgen.hub.directory import load_directory, save_model
from bgen.models.generators.latent_flow import LatentFlow
from bgen.tasks.load import Model, load_model

COMMON = {
    "width": 32,
    "layers": 1,
    "attention": {"heads": 2},
    "mamba2": {"head_width": 16, "state": 8},
    "time": {"scale": 24.0, "tokens": 2},
    "tokens": {"count": 2},
}
BACKBONES: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp"},
    "transformer": {"name": "transformer"},
    "set_transformer": {"name": "set_transformer"},
    "ssm": {"name": "ssm"},
    "hybrid": {"name": "hybrid"},
    "cells alone": {"name": "hybrid", "pattern": ["cells"]},
    "time alone": {"name": "hybrid", "pattern": ["time"]},
    "tokens": {"name": "hybrid", "pattern": ["tokens", "none"]},
    "tokens, cells and time": {"name": "hybrid", "pattern": ["time", "cells", "tokens", "none"]},
}
STARTS: dict[str, dict[str, Any]] = {
    "noise": {"source": "noise"},
    "neighbours": {"source": "neighbours"},
    "whole": {"source": "neighbours", "coupling": {"cells": 100, "growth": True}},
}
DEFAULT = ("transformer", "tokens, cells and time")
MORE = [(name, "whole") for name in BACKBONES if name not in DEFAULT]
MORE += [("hybrid", "noise"), ("tokens, cells and time", "noise")]


def model_with(course: Path, backbone: dict[str, Any], starts: dict[str, Any], folder: Path) -> Model:
    """Return the course's model with another velocity network, whose velocities are random, saved and loaded."""
    saved = load_directory(course)
    old = saved.module
    assert isinstance(old, LatentFlow)
    settings = old.config.model_dump() | {"backbone": BackboneConfig.model_validate(COMMON | backbone)} | starts
    torch.manual_seed(0)
    numbers = {name: (saved.columns[name].mean, saved.columns[name].std) for name in old.conditions.number_names}
    flow = LatentFlow(type(old.config).model_validate(settings), old.vae, old.conditions.sizes, numbers)
    for name, parameter in flow.named_parameters():
        if "head" in name or "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(replace(saved, module=flow.eval()), folder)
    return load_model(folder)


@pytest.mark.parametrize(
    ("backbone", "starts"),
    [
        ("mlp", "noise"),
        ("hybrid", "neighbours"),
        ("transformer", "whole"),
        ("tokens, cells and time", "whole"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE),
    ],
)
def test_every_verb_answers(backbone: str, starts: str, course: Path, demo: Any, tmp_path: Path) -> None:
    model = model_with(course, BACKBONES[backbone], STARTS[starts], tmp_path / "model")
    few = {"steps": 2, "solver": "euler"}
    between = model.interpolate(demo.cells, 24.0, n=20, sample=few)
    ahead = model.forecast(demo.cells, 48.0, n=20, sample=few)
    whole = model.generate(20, times=[0.0, 12.0, 48.0], steps=2)
    for made, times in ((between, [24.0]), (ahead, [48.0]), (whole, [0.0, 12.0, 48.0])):
        assert made.obs["time"].value_counts().to_dict() == dict.fromkeys(times, 20)
        assert np.asarray(made.X.sum(1)).min() > 0
        np.testing.assert_array_equal(made.X.data, np.rint(made.X.data))
    again = model.interpolate(demo.cells, 24.0, n=20, sample=few)
    assert abs(again.X - between.X).nnz == 0
