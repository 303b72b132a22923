"""A decoder that does not come with bgen, added as bgen/models/vae/decoders/README.md says, trained, grown, exported.

Axes: B cells, G genes, D latent size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import anndata
import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bgen as package
import bgen.config.vae as settings
import bgen.models.vae.decoders.registry as registry
from bgen.config.components import NamedSection
from bgen.config.section import PositiveFloat
from bgen.config.vae import VAEConfig
from bgen.hub.directory import load_directory
from bgen.models.grow import grow_vae
from bgen.models.vae.covariates import Covariates
from bgen.models.vae.decoders.decoder import Decoder
from bgen.models.vae.vae import VAE
from bgen.nn.flops import linear
from bgen.track.record import read
from bgen.train.engine.parameter_groups import undecayed

QUICK = ["train.steps=12", "train.global_batch=96", "train.eval_every=6", "train.warmup=2", "train.log_every=4"]
QUICK += ["track.mlflow=false", "track.progress=false"]


class LinearDecoderConfig(NamedSection):
    """A toy."""

    name: Literal["linear"] = "linear"
    theta: PositiveFloat = Field(10.0, description="Inverse dispersion that genes start with.")


class LinearDecoder(Decoder):
    """Logits that are linear in the state: the factors can be read."""

    decayed = ("factors",)

    def __init__(self, config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__()
        assert isinstance(config.decoder, LinearDecoderConfig)
        assert config.likelihood == "nb"
        self.covariates = Covariates(covariates, config.latent)
        self.factors = nn.Parameter(0.1 * torch.randn(config.latent, n_genes))
        self.level = nn.Parameter(torch.zeros(n_genes))
        self.dispersion = nn.Parameter(torch.full((n_genes,), config.decoder.theta).log())

    def forward(self, z: Tensor, obs: Mapping[str, Tensor], keys: Tensor | None) -> tuple[Tensor, ...]:
        """See Decoder."""
        return self.covariates(z, obs) @ self.factors + self.level, self.dispersion

    @property
    def log_theta(self) -> Tensor:
        """See Decoder."""
        return self.dispersion

    @torch.no_grad()
    def initialise_genes(self, mean_counts: Tensor) -> None:
        """See Decoder."""
        self.level.copy_((mean_counts + 1e-6).log())

    @torch.no_grad()
    def shift_genes(self, shifts: Tensor) -> None:
        """See Decoder."""
        self.level.add_(shifts)

    @torch.no_grad()
    def start_genes(self, known: int, shares: Tensor) -> None:
        """See Decoder."""
        self.factors[:, known:] = 0
        self.level[known:] = self.level[:known].logsumexp(0) + shares.log()

    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """See Decoder."""
        yield from (*self.covariates.parameters(), self.level, self.dispersion)
        if genes:
            yield self.factors

    def flops(self, cells: int) -> int:
        """See Decoder."""
        return linear(cells, *self.factors.shape)


@pytest.fixture(scope="module")
def toy(adding: Any) -> Any:
    """The toy, registered."""
    adding.line(settings, "DECODERS", "linear", LinearDecoderConfig)
    adding.line(registry, "DECODERS", "linear", LinearDecoder)
    return adding


@pytest.fixture(scope="module")
def run(toy: Any, bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with the toy, trained through the command line."""
    out = tmp_path_factory.mktemp("linear") / "run"
    given = ["vae.decoder={name: linear, theta: 3}", "vae.hidden=32", "vae.covariates=[batch]"]
    done = bgen("train", "demo/vae", f"out={out}", f"data.store={demo.store}", *given, *QUICK)
    assert done.code == 0, done
    return out


def vae() -> VAE:
    torch.manual_seed(0)
    config = {"latent": 3, "hidden": 16, "blocks": 1, "decoder": {"name": "linear"}}
    return VAE(VAEConfig.model_validate(config), 30, {"batch": 2}).eval()


def test_a_decoder_touches_three_files(toy: Any) -> None:
    assert toy.touched == 3
    assert list(registry.DECODERS) == list(settings.DECODERS)


def test_it_learns_and_comes_back_with_the_exported_model(run: Path, demo: Any) -> None:
    losses = [row["loss"] for row in read(run / "record.jsonl") if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    written = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))["vae"]["decoder"]
    assert written == {"name": "linear", "theta": 3.0}
    model = package.load(run / "model")
    assert isinstance(model.saved.vae.decoder, LinearDecoder)
    cells = anndata.read_h5ad(demo.cells)[:30].copy()
    expected = model.denoise(cells).layers["denoised"]
    np.testing.assert_allclose(expected.sum(1), np.asarray(cells.X.sum(1)).ravel(), rtol=1e-4)


def test_finetuning_adds_genes_and_batches(run: Path, bgen: Any, demo: Any, tmp_path: Path) -> None:
    new = anndata.read_h5ad(demo.cells)[:120].copy()
    new.var_names = [*new.var_names[:114], *[f"NEW{number}" for number in range(6)]]
    new.obs["batch"] = "batch_new"
    new.write_h5ad(tmp_path / "new.h5ad")
    asked = ["--task", "annotate", "--label", "cell_type", "--mode", "head", "--add-genes", "--out", tmp_path / "out"]
    done = bgen("finetune", run / "model", tmp_path / "new.h5ad", *asked, *QUICK)
    assert done.code == 0, done
    old, grown = (load_directory(folder / "model").vae for folder in (run, tmp_path / "out"))
    assert isinstance(old.decoder, LinearDecoder)
    assert isinstance(grown.decoder, LinearDecoder)
    assert grown.decoder.factors.shape == (old.decoder.factors.shape[0], 126)
    assert grown.decoder.factors[:, 120:].abs().min() > 0  # they started at zero and were trained
    assert not torch.equal(grown.decoder.level[:120], old.decoder.level)


def test_what_is_known_stays_as_it_was_and_new_genes_start_at_their_share(toy: Any) -> None:
    old = vae()
    with torch.no_grad():
        old.decoder.factors.zero_()  # type: ignore[union-attr,operator]
    grown = grow_vae(old, {"batch": 4}, torch.tensor([0.2, 0.05]))
    z, batch = torch.randn(4, 3), {"batch": torch.tensor([0, 1, -1, 0])}
    before = old.decode(z, torch.full((4,), 100.0), batch).mean
    after = grown.decode(z, torch.full((4,), 125.0), batch).mean
    torch.testing.assert_close(after[:, :30], before)
    torch.testing.assert_close(after[:, 30:], torch.tensor([[20.0, 5.0]]).expand(4, 2), rtol=1e-4, atol=1e-4)


def test_it_says_what_decays(toy: Any) -> None:
    model = vae()
    own = {name for name, _ in model.named_parameters() if name.startswith("decoder.")}
    assert own - undecayed(model) == {"decoder.factors"}


def test_its_formula_is_what_torch_counts(toy: Any) -> None:
    model = vae().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.decode(torch.randn(7, 3), torch.ones(7), {})
    assert counter.get_total_flops() == model.decoder.flops(7)
