"""The stages by name."""

from __future__ import annotations

from pathlib import Path

import torch

from bgen.checkpoint.weights import export_weights
from bgen.config.load import load_either
from bgen.config.run import Config
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.store.open import open_data
from bgen.store.store import Store
from bgen.train.stages.flow import FlowStage
from bgen.train.stages.from_store import StoreStage
from bgen.train.stages.vae import VAEStage


def rebuild(run: Path, world: World) -> tuple[Config, StoreStage, Path]:
    """Return a run's configuration, and its stage with the weights of its newest verified checkpoint."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml. `bgen train` makes one.")
    config = load_either(run / "config.yaml")
    if not isinstance(config, Config):
        raise UserError(f"{run} is a run of `bgen finetune`, which exports its model itself: {run.parent / 'model'}.")
    weights, checkpoint = export_weights(run / "checkpoints")
    stage = make_stage(config, open_data(config.data), world)
    stage.module.load_state_dict(weights)
    stage.module.eval()
    return config, stage, checkpoint


def make_stage(config: Config, store: Store, world: World) -> VAEStage | FlowStage:
    """Build the stage that a configuration names."""
    torch.manual_seed(config.seed)  # the initial weights
    return VAEStage(config, store, world) if config.stage == "vae" else FlowStage(config, store, world)
