"""Fine-tuning, first part: the autoencoder, adapted to new genes, new batches, another tissue."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bgen.config.finetune import FinetuneConfig
from bgen.data.cells_in_memory import MemoryCells
from bgen.distributed import world as ranks
from bgen.hub.directory import SavedModel
from bgen.models.vae.vae import VAE
from bgen.nn.lora import add_lora, merge_lora
from bgen.tasks.finetune.request import RANK, Mode
from bgen.tasks.finetune.runs import Runs
from bgen.train.stages.in_memory import MemoryStage


def adapt_autoencoder(
    grown: SavedModel,
    parent: SavedModel,
    cells: MemoryCells,
    watched: tuple[NDArray[np.int64], NDArray[np.int64]],
    config: FinetuneConfig,
    mode: Mode,
    runs: Runs,
) -> None:
    """Train the autoencoder on the data, if there is one; in mode head only if it has new rows, and then only those
    tables.
    """
    if not isinstance(grown.codec, VAE):
        return
    vae = grown.vae
    is_larger = vae.n_genes > parent.vae.n_genes or vae.covariates != parent.vae.covariates
    if mode == "head" and not is_larger:
        return
    vae.requires_grad_(mode == "full")
    if mode == "lora":
        add_lora(vae, RANK)
    if mode != "full":
        genes = vae.n_genes > parent.vae.n_genes
        for parameter in (*vae.encoder.tables(genes=genes), *vae.decoder.tables(genes=genes)):
            parameter.requires_grad_(True)
    # All that is built on the parent's latents was whitened by its statistics, so these stay.
    runs.say(f"Adapting the autoencoder ({_trained(vae):,} parameters) ...")
    stage = MemoryStage(config, vae, cells, *watched, ranks.current(), runs.fingerprint(grown), "nll")
    result = runs.fit(config, stage)
    best = "" if result.best is None else f", best held-out {stage.monitor} {result.best:.4g}"
    runs.say(f"{result.step} steps{best}.")
    merge_lora(vae)
    vae.requires_grad_(False).eval()


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
