"""A classifier of cells: what its head reads."""

from __future__ import annotations

import torch

from bgen.config.vae import VAEConfig
from bgen.models.annotator import Annotator
from bgen.models.vae.vae import VAE


def test_the_head_reads_whitened_latents() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.model_validate({"latent": 3, "hidden": 8, "blocks": 0}), 20, {})
    mean, spread = torch.tensor([1.0, -2.0, 30.0]), torch.tensor([0.5, 4.0, 10.0])
    vae.latent_mean[:-1], vae.latent_std[:-1] = mean, spread  # the last is that of the library
    annotator = Annotator(vae, torch.ones(2))
    torch.nn.init.normal_(annotator.head.weight)
    z = torch.randn(7, 3)
    torch.testing.assert_close(annotator.logits(z), (z - mean) / spread @ annotator.head.weight.T + annotator.head.bias)
    torch.testing.assert_close(annotator.probabilities(z), annotator.logits(z).softmax(1))
