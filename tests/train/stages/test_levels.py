"""Levels that were moved come back: those of a flow, fitted to cells that it generated itself before."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgen.config.backbone import BackboneConfig
from bgen.config.flow import FlowConfig, LogCountsConfig, SampleConfig
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader
from bgen.distributed import world as ranks
from bgen.models.codec import CountsCodec
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.log_counts import LogCounts
from bgen.models.vae.vae import VAE
from bgen.order.keys import hash_keys
from bgen.order.sample import sample
from bgen.train.stages import levels

GENES, CELLS = 60, 3000
SETTINGS = SampleConfig(steps=2)


class Cells:
    """Counts ``[N, G]`` with a type and a batch each, read as those of a store are; also its own store."""

    def __init__(self, counts: Tensor, obs: dict[str, Tensor]) -> None:
        self.counts, self.obs, self.store = counts, obs, self

    def split(self, name: str) -> range:
        return range(len(self.counts))

    def sample(self, cells: range, n: int, *key: int) -> NDArray[np.int64]:
        return sample(cells, n, np.array([0, len(cells)]), *key)

    def read_cells(self, cells: NDArray[np.int64]) -> CellBatch:
        counts = self.counts[cells].float()
        rows, genes = counts.nonzero(as_tuple=True)
        indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts != 0).sum(dim=1).cumsum(0)))
        number = torch.from_numpy(cells)
        obs = {name: column[number] for name, column in self.obs.items()}
        return CellBatch(indptr, genes.int(), counts[rows, genes], GENES, number, number, obs=obs)


def generated(flow: LatentFlow, obs: dict[str, Tensor], seed: int) -> Tensor:
    """Counts, by keys that no fit uses."""
    keys = torch.from_numpy(hash_keys(seed, 7, np.arange(CELLS)).view(np.int64))
    z, log_library = flow.vae.unwhiten(flow.sample({"type": obs["type"]}, CELLS, keys, SETTINGS))
    return flow.vae.decode(z, log_library.exp(), obs).sample(keys)


def means(counts: Tensor) -> Tensor:
    return torch.log1p(1e4 * counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).double().mean(dim=0)


@pytest.mark.parametrize("kind", ["nb", "zinb", "log counts"])
@torch.no_grad()
def test_generated_cells_have_the_measured_means(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codec: CountsCodec
    if kind == "log counts":
        codec = LogCounts(LogCountsConfig(counts="poisson"), GENES)
        codec.latent_mean[:-1] = 4.0
    else:
        codec = VAE(VAEConfig(latent=3, hidden=8, blocks=0, likelihood=kind), GENES, {"batch": 2})
    codec.shift_genes(0.5 * torch.randn(GENES))
    codec.latent_mean[-1] = 5.5
    flow = LatentFlow(FlowConfig(backbone=BackboneConfig(width=16)), codec, {"type": 3}, {}).eval()
    obs = {"type": torch.arange(CELLS) % 3, "batch": torch.arange(CELLS) % 2}
    cells = Cells(generated(flow, obs, 0), obs)
    state = {name: tensor.clone() for name, tensor in flow.state_dict().items()}

    moved = 0.3 * torch.randn(GENES)
    codec.shift_genes(moved)
    wrong = means(cells.counts) - means(generated(flow, obs, 1))
    monkeypatch.setattr(levels, "COMPARED_LATENTS", CELLS)
    levels.fit_generated_levels(flow, SETTINGS, cast(CountReader, cells), "train", ranks.start())
    right = means(cells.counts) - means(generated(flow, obs, 1))
    assert right.square().mean() < 0.1 * wrong.square().mean()
    changed = [name for name, tensor in flow.state_dict().items() if not tensor.equal(state[name])]
    assert changed == ["vae.levels" if kind == "log counts" else "vae.decoder.logits.bias"]
