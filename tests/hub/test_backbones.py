"""A model directory gives back the model that was written, whatever its backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from bgen.config.flow import FlowConfig, SampleConfig
from bgen.config.vae import VAEConfig
from bgen.errors import UserError
from bgen.hub.about import About
from bgen.hub.directory import ColumnInfo, SavedModel, load_directory, save_model
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE

G = 6
BACKBONES: dict[str, dict[str, Any]] = {
    "mlp": {"layers": 2},
    "hybrid": {
        "layers": 1,
        "pattern": ["cells", "time"],
        "time": {"mixer": "s4d", "scale": 24.0, "tokens": 2},
        "cells": {"mixer": "set_attention", "inducing": 2},
    },
    "ssm": {"layers": 1, "mamba2": {"head_width": 8, "state": 4}},
    **{mixer: {"name": "ssm", "layers": 1, "time": {"mixer": mixer}} for mixer in ("mamba1", "attention")},
    "hyena": {"name": "ssm", "layers": 1, "time": {"mixer": "hyena", "real_time": False}},
    "transformer": {"layers": 1},
    "set_transformer": {"layers": 1},
}


def saved(backbone: dict[str, Any]) -> SavedModel:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent=2, hidden=8), G, {})
    config = FlowConfig.model_validate({"backbone": {"width": 16} | backbone, "vae": "runs/vae"})
    flow = LatentFlow(config, vae, {"cell_type": 2}, {"time": (24.0, 12.0)}).eval()
    return SavedModel(
        module=flow,
        genes=pd.DataFrame({"id": [f"g{i}" for i in range(G)], "symbol": [f"s{i}" for i in range(G)], "cells": 1}),
        columns={
            "cell_type": ColumnInfo("cell_type", "category", ["a", "b"]),
            "time": ColumnInfo("time", "number", [], 24.0, 12.0),
        },
        combinations=pd.DataFrame({"cell_type": [0, 1], "time": [0.0, 24.0], "cells": [3, 4]}),
        sample=SampleConfig(steps=3),
        about=About(name="test", organism="synthetic"),
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_a_flow_of_any_backbone_comes_back(name: str, tmp_path: Path) -> None:
    model = saved({"name": name} | BACKBONES[name])
    save_model(model, tmp_path / "model")
    again = load_directory(tmp_path / "model")
    assert isinstance(again.module, LatentFlow)
    assert again.module.config.backbone == model.module.config.backbone
    assert again.fingerprint() == model.fingerprint()
    conditions = {"cell_type": torch.tensor([0, 1, -1]), "time": torch.tensor([0.0, 24.0, torch.nan])}
    sample = [m.module.sample(conditions, 3, torch.arange(3), SampleConfig(steps=2)) for m in (model, again)]
    assert torch.equal(*sample)


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    save_model(saved({"name": "mlp", "layers": 2}), tmp_path / "model")
    config = (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "model" / "config.json").write_text(config.replace('"layers": 2', '"layers": 3'), encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        load_directory(tmp_path / "model")
