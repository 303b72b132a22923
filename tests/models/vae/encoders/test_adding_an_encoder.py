"""An encoder that does not come with bgen, added as bgen/models/vae/encoders/README.md says, trained, grown, exported.

Axes: B cells, G genes, E width of a gene's row, D latent size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import anndata
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bgen.config.vae as settings
import bgen.models.vae.encoders.registry as registry
from bgen.config.components import NamedSection
from bgen.config.load import load_config
from bgen.config.section import PositiveInt
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.hub.directory import load_directory
from bgen.models.grow import grow_vae
from bgen.models.vae.covariates import Covariates
from bgen.models.vae.encoders.encoder import Encoder
from bgen.models.vae.sparse_linear import densify
from bgen.models.vae.vae import VAE
from bgen.nn.flops import layers, linear
from bgen.track.record import read
from bgen.train.engine.parameter_groups import undecayed

QUICK = ["train.steps=12", "train.global_batch=96", "train.eval_every=6", "train.warmup=2", "train.log_every=4"]
QUICK += ["track.mlflow=false", "track.progress=false"]


class MeanEncoderConfig(NamedSection):
    """A toy."""

    name: Literal["mean"] = "mean"
    rows: PositiveInt = Field(8, description="Width of a gene's row, E.")


class MeanEncoder(Encoder):
    """The mean row of a cell's molecules, through one layer."""

    decayed = ("table",)

    def __init__(self, config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> None:
        super().__init__()
        assert isinstance(config.encoder, MeanEncoderConfig)
        rows = config.encoder.rows
        self.table = nn.Parameter(torch.randn(rows, n_genes))  # genes last: growth does not ask which axis
        self.scale = nn.Parameter(torch.ones(rows))
        self.covariates = Covariates(covariates, rows)
        self.head = nn.Linear(rows, 2 * config.latent)

    def forward(self, batch: CellBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See Encoder."""
        dense = densify(batch.rows, batch.indices, counts, (len(batch), batch.n_genes))
        share = dense / dense.sum(1, keepdim=True).clamp_min(1.0)
        hidden = self.covariates((share @ self.table.T) * self.scale, batch.obs)
        mean, logvar = self.head(hidden).float().chunk(2, dim=1)
        return mean, logvar.clamp(-12.0, 8.0)

    @torch.no_grad()
    def start_genes(self, known: int) -> None:
        """See Encoder."""
        self.table[:, known:] = 0

    def tables(self, *, genes: bool) -> Iterator[nn.Parameter]:
        """See Encoder."""
        yield from self.covariates.parameters()
        if genes:
            yield self.table

    def flops(self, cells: int, nonzeros: int) -> int:
        """See Encoder."""
        return linear(cells, *self.table.shape) + layers(cells, self.head)


@pytest.fixture(scope="module")
def mean(adding: Any) -> Any:
    """The toy, registered."""
    adding.line(settings, "ENCODERS", "mean", MeanEncoderConfig)
    adding.line(registry, "ENCODERS", "mean", MeanEncoder)
    return adding


@pytest.fixture(scope="module")
def run(mean: Any, bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with the toy, trained through the command line."""
    out = tmp_path_factory.mktemp("mean") / "run"
    given = ["vae.encoder.name=mean", "vae.encoder.rows=6", "vae.hidden=32", "vae.covariates=[batch]"]
    done = bgen("train", "demo/vae", f"out={out}", f"data.store={demo.store}", *given, *QUICK)
    assert done.code == 0, done
    return out


def cells(genes: int = 30) -> CellBatch:
    counts = torch.poisson(torch.full((12, genes), 0.5), generator=torch.Generator().manual_seed(0)) + torch.eye(
        12, genes
    )
    rows, columns = counts.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts != 0).sum(1).cumsum(0)))
    numbers = torch.arange(12)
    obs = {"batch": numbers % 3 - 1}
    return CellBatch(indptr, columns.int(), counts[rows, columns], genes, keys=numbers, cells=numbers, obs=obs)


def vae(genes: int = 30) -> VAE:
    torch.manual_seed(0)
    encoder = {"name": "mean", "rows": 6}
    config = VAEConfig.model_validate({"latent": 3, "hidden": 16, "blocks": 1, "encoder": encoder})
    return VAE(config, genes, {"batch": 2}).eval()


def test_an_encoder_touches_three_files(mean: Any) -> None:
    assert mean.touched == 3
    assert list(registry.ENCODERS) == list(settings.ENCODERS)


def test_it_learns_and_its_settings_are_exported(run: Path) -> None:
    losses = [row["loss"] for row in read(run / "record.jsonl") if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    written = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))["vae"]["encoder"]
    assert written == {"name": "mean", "rows": 6}
    encoder = load_directory(run / "model").vae.encoder
    assert isinstance(encoder, MeanEncoder)
    assert not torch.equal(encoder.scale, torch.ones(6))


def test_a_flow_trains_on_it_and_generates(run: Path, bgen: Any, demo: Any, tmp_path: Path) -> None:
    out = tmp_path / "flow"
    given = [f"out={out}", f"data.store={demo.store}", f"flow.vae={run}", "flow.conditions=[cell_type]"]
    done = bgen("train", "demo/flow", *given, *QUICK)
    assert done.code == 0, done
    done = bgen("generate", out / "model", "--n", 20, "--out", tmp_path / "cells.h5ad")
    assert done.code == 0, done
    assert anndata.read_h5ad(tmp_path / "cells.h5ad").shape == (20, 120)


@pytest.mark.parametrize(
    "mode", [pytest.param("head", marks=pytest.mark.slow), "lora", pytest.param("full", marks=pytest.mark.slow)]
)
def test_finetuning_adds_genes_and_batches(run: Path, tune_with_new_genes: Any, mode: str) -> None:
    old, grown = tune_with_new_genes(run, mode)
    assert isinstance(old.encoder, MeanEncoder)
    assert isinstance(grown.encoder, MeanEncoder)
    assert grown.encoder.table[:, 120:].abs().min() > 0  # they started at zero and were trained
    assert torch.equal(grown.encoder.scale, old.encoder.scale) == (mode != "full")
    assert torch.equal(grown.encoder.head.bias, old.encoder.head.bias) == (mode != "full")
    assert (
        len(grown.encoder.covariates.tables[0].table.weight) == len(old.encoder.covariates.tables[0].table.weight) + 1
    )


def test_what_is_known_stays_as_it_was(mean: Any) -> None:
    old = vae()
    for table in old.encoder.covariates.tables:  # type: ignore[union-attr]
        torch.nn.init.normal_(table.table.weight[1:])
    grown = grow_vae(old, {"batch": 4}, torch.tensor([0.1, 0.2]))
    batch = cells()
    for before, after in zip(old.encode(batch), grown.encode(replace(batch, n_genes=32)), strict=True):
        torch.testing.assert_close(before, after)


def test_it_says_what_decays(mean: Any) -> None:
    model = vae()
    own = {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    assert own - undecayed(model) == {"encoder.table", "encoder.head.weight"}


def test_its_formula_is_what_torch_counts(mean: Any) -> None:
    model, batch = vae().requires_grad_(False), cells()
    with FlopCounterMode(display=False) as counter:
        model.encode(batch)
    assert counter.get_total_flops() == model.latents_flops(len(batch), len(batch.counts))


def test_bgen_plan_knows_it(mean: Any, bgen: Any) -> None:
    given = ["data.store=nowhere", "vae.encoder={name: mean, rows: 6}"]
    done = bgen("plan", "vae", *given, "--genes", 100, "--expressed", 20, "--gpu", "H100", "--json")
    assert done.code == 0, done
    config = load_config("vae", given).vae
    model = VAE(config, 100, {})
    assert json.loads(done.out)["flops_per_cell"] == 3 * (model.encoder.flops(1, 20) + model.decoder.flops(1))


def test_mistakes_in_its_settings_are_named(mean: Any) -> None:
    for override, said in (
        ("vae.encoder={name: mean, row: 3}", "vae.encoder.row: unknown key. Did you mean 'rows'?"),
        ("vae.encoder={name: mean, rows: 0}", "vae.encoder.rows: Input should be greater than 0"),
        ("vae.encoder.rows=3", "vae.encoder.rows: unknown key."),
        ("vae.encoder.name=maen", "'state_vector', 'gene_set', 'ranked' or 'mean' (it is 'maen')"),
    ):
        with pytest.raises(UserError) as caught:
            load_config("vae", [override])
        assert said in str(caught.value)
