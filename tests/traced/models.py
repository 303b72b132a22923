"""Small models of every kind, and batches for them, as the tests of this folder trace them."""

from __future__ import annotations

from typing import Any

import torch

from bgen.config.backbone import BackboneConfig
from bgen.config.flow import FlowConfig, MemberSizes
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.models.annotator import LABEL, Annotator
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE

G, B, EACH = 40, 24, 6
T, N = 3, 4

SETS = {"guide": MemberSizes(members=3, labels=4, largest=2, names=6, vector=2, amount="dose", forget=0.5)}


def cells() -> CellBatch:
    zero = torch.zeros(B, dtype=torch.int64)
    return CellBatch(
        torch.arange(B + 1) * EACH,
        (torch.arange(B * EACH) % G).int(),
        torch.ones(B * EACH),
        G,
        keys=torch.arange(B),
        cells=torch.arange(B),
        step=3,
        obs={"batch": zero, "guide": zero, LABEL: zero, "time": torch.zeros(B), "dose": torch.zeros(B)},
    )


def course(known: bool = False, **changes: Any) -> TrajectoryBatch:
    shape = B // (T * N), T
    made = TrajectoryBatch.of(
        cells(),
        mask=torch.ones(*shape, N, dtype=torch.bool),
        time=torch.arange(T).float().expand(shape).contiguous(),
        control=torch.zeros(shape, dtype=torch.bool),
        moved=torch.zeros(*shape, 5) if known else None,
    )
    made.whitened = torch.zeros(B, 5) if known else None
    return made


def vae(**settings: Any) -> VAE:
    settings = {"hidden": 16, "latent": 4, "covariates": ["batch"]} | settings
    return VAE(VAEConfig.model_validate(settings), G, {"batch": 4})


def flow(backbone: dict[str, Any], sets: Any = None, codec: Any = None, **settings: Any) -> LatentFlow:
    small = {
        "width": 16,
        "layers": 1,
        "attention": {"heads": 2},
        "mamba2": {"head_width": 8, "state": 4, "backend": "torch"},
        "mamba1": {"backend": "torch"},
    }
    config = FlowConfig(backbone=BackboneConfig.model_validate(small | backbone), **settings)
    return LatentFlow(config, codec or vae(), {"batch": 4}, {"time": (0.0, 1.0)}, sets)


def along_time(mixer: str, **settings: Any) -> LatentFlow:
    time = {"mixer": mixer, "tokens": 2, "real_time": mixer != "hyena"}
    return flow({"name": "hybrid", "time": time, **settings})


def annotator() -> Annotator:
    made = Annotator(vae(), torch.ones(3))
    made.vae.decoder.requires_grad_(False)
    return made
