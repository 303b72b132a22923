"""A classifier of cells: an encoder and a linear head, which may be trained together.

Axes: B cells, D latent size, K labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgen.data.batch import CellBatch
from bgen.models.vae.vae import VAE

LABEL = "label"
"""Name of the obs column of a batch that holds the codes of the labels."""


class Annotator(nn.Module):
    """log p(label | cell) = log softmax(A z + b), with z the whitened latent mean.

    Parameters
    ----------
    vae
        Trained.
    weights
        Weight of each label in the loss ``[K]``, of mean 1 over the training cells, so that rare labels count.
    """

    label_weights: Tensor

    def __init__(self, vae: VAE, label_weights: Tensor) -> None:
        super().__init__()
        self.vae = vae
        self.head = nn.Linear(vae.config.latent, len(label_weights))
        self.register_buffer("label_weights", label_weights)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def device(self) -> torch.device:
        """Where the classifier is."""
        return self.vae.device

    def forward(self, batch: CellBatch) -> dict[str, Tensor]:
        """Return ``loss`` (weighted cross-entropy, nats) and ``error`` per cell ``[B]``.

        In training the encoder sees as much of the counts as in the VAE's.
        """
        logits = self.logits(self.vae.encoder(batch, self.vae.shown(batch))[0])
        codes = batch.obs[LABEL]
        loss = F.cross_entropy(logits, codes, weight=self.label_weights, reduction="none")
        return {"loss": loss, "error": (logits.argmax(1) != codes).float()}

    def logits(self, mean: Tensor) -> Tensor:
        """``[B, K]`` for latent means ``[B, D]``."""
        return self.head(self.vae.whiten_state(mean))

    @torch.no_grad()
    def probabilities(self, mean: Tensor) -> Tensor:
        """``[B, K]`` for latent means ``[B, D]``."""
        return torch.softmax(self.logits(mean), dim=1)
