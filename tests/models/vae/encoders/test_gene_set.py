"""The encoder of a set of genes: that counts get in, what nothing to read is, and everything that a component says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bgen.config.load import load_config
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.hub.directory import load_directory
from bgen.models.grow import grow_vae
from bgen.models.vae.encoders.gene_set import GeneSetEncoder
from bgen.models.vae.vae import VAE
from bgen.train.engine.parameter_groups import undecayed

G = 40
QUICK = ["train.steps=12", "train.global_batch=96", "train.eval_every=6", "train.warmup=2", "train.log_every=4"]
QUICK += ["track.mlflow=false", "track.progress=false"]


def cells(dense: Tensor) -> CellBatch:
    rows, genes = dense.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)))
    ids = torch.arange(len(dense))
    return CellBatch(indptr, genes.int(), dense[rows, genes], dense.shape[1], ids, ids, obs={"batch": ids % 3 - 1})


def counts(n: int = 12) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (1 + torch.poisson(torch.full((n, G), 2.0), generator=g)) * (torch.rand(n, G, generator=g) < 0.3)


def vae(covariates: bool = True, latent_tokens: int = 1, **settings: object) -> VAE:
    torch.manual_seed(0)
    encoder = {"name": "gene_set", "tokens": 3, "width": 16, "rows": 8, "token_blocks": 1, **settings}
    if settings.get("attention") is False:
        encoder["tokens"] = 1
    config = VAEConfig.model_validate(
        {"latent": 3, "latent_tokens": latent_tokens, "hidden": 16, "blocks": 1, "encoder": encoder}
    )
    model = VAE(config, G, {"batch": 2} if covariates else {}).eval()
    for table in model.encoder.posterior.covariates.tables:  # type: ignore[union-attr]
        torch.nn.init.normal_(table.table.weight[1:])
    return model


def tokens(model: VAE, batch: CellBatch, given: Tensor | None = None) -> Tensor:
    assert isinstance(model.encoder, GeneSetEncoder)
    return model.encoder.tokens(batch, batch.counts if given is None else given)


@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": "molecules"},
        {"weighting": "log"},
        {"weighting": "genes", "values": True},
        {"weighting": "molecules", "values": True},
        {"weighting": "log", "attention": False},
    ],
)
def test_doubling_one_count_changes_what_is_read(settings: dict[str, Any]) -> None:
    """A norm in front of the read would undo it: LN(x e) is the same for every x."""
    model, dense = vae(**settings), counts()
    more = dense.clone()
    gene = int(dense[4].nonzero()[0, 0])
    more[4, gene] *= 2
    before, after = tokens(model, cells(dense)), tokens(model, cells(more))
    changed = (after - before).abs().amax((1, 2))
    assert changed[4] > 1e-3
    assert (torch.cat((changed[:4], changed[5:])) == 0).all()


def test_genes_alone_do_not_see_counts() -> None:
    model, dense = vae(weighting="genes"), counts()
    torch.testing.assert_close(tokens(model, cells(dense)), tokens(model, cells((dense > 0).float())))


def test_a_token_with_nothing_to_read_is_its_seed() -> None:
    model, dense = vae(), counts()
    dense[[0, 11]] = 0
    found = tokens(model, cells(dense))
    assert isinstance(model.encoder, GeneSetEncoder)
    assert torch.equal(found[0], model.encoder.seed)
    assert torch.equal(found[11], model.encoder.seed)
    mean, logvar = model.encode(cells(dense))
    assert mean.isfinite().all()
    assert logvar.isfinite().all()


def test_a_latent_token_holds_what_its_own_tokens_have_read() -> None:
    encoder = {"name": "gene_set", "tokens": 6, "width": 16, "rows": 8}
    config = VAEConfig.model_validate({"latent": 12, "latent_tokens": 3, "encoder": encoder})
    model, batch = VAE(config, G, {}).eval(), cells(counts())
    before = torch.stack(model.encode(batch)).unflatten(-1, (3, 4))
    assert isinstance(model.encoder, GeneSetEncoder)
    with torch.no_grad():
        model.encoder.seed[2:4] += torch.randn(2, 16)  # of the second latent token
    changed = (torch.stack(model.encode(batch)).unflatten(-1, (3, 4)) - before).abs().amax((0, 1, 3))
    assert changed[1] > 1e-3
    assert changed[0] == changed[2] == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"weighting": "log", "values": True}])
def test_a_cell_does_not_feel_the_others_of_its_micro_batch(training: bool, settings: dict[str, Any]) -> None:
    model = vae(**settings).train(training)
    batch = replace(cells(counts()), step=100)
    whole = model(batch)["loss"]
    parts = [model(batch.take(torch.arange(a, b)))["loss"] for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = vae().train()
        assert isinstance(model.encoder, GeneSetEncoder)
        model.encoder.token_blocks[0].recompute = recompute  # type: ignore[assignment]
        model(replace(cells(counts()), step=100))["loss"].sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_bf16_autocast_trains_and_softmax_and_tables_stay_float32() -> None:
    model, batch = vae(values=True), cells(counts())
    full, exact = model(batch)["loss"], read(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(model.encoder, GeneSetEncoder)
        assert model.encoder.genes().dtype == torch.float32
        assert torch.equal(read(model, batch), exact)
        half = model(batch)["loss"]
        half.mean().backward()
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def read(model: VAE, batch: CellBatch) -> Tensor:
    assert isinstance(model.encoder, GeneSetEncoder)
    return model.encoder.read(model.encoder.genes(), batch, batch.counts, batch.counts)[0]


def test_what_decays_are_gene_rows_and_layers_but_no_query_and_no_seed() -> None:
    model = vae(values=True)
    own = {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    attention = {f"token_blocks.0.attention.{name}_proj" for name in ("q", "kv", "out")}
    blocks = {f"token_blocks.0.{end}" for end in ("inner", "outer")}
    layers = {"read.key", "read.value", "read.slope", "out", "posterior.head"} | attention | blocks
    assert own - undecayed(model) == {"encoder.genes.residual"} | {f"encoder.{name}.weight" for name in layers}
    assert {"encoder.read.query", "encoder.seed"} <= undecayed(model)


@pytest.mark.parametrize(
    "settings",
    [{}, {"values": True, "token_blocks": 2}, {"attention": False}, {"tokens": 3, "latent_tokens": 3}],
)
def test_its_formula_is_what_torch_counts(settings: dict[str, Any]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, batch = vae(**settings), cells(counts())
    assert isinstance(model.encoder, GeneSetEncoder)
    sparse = model.encoder.read.sparse_flops(len(batch.counts))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        mean, logvar = model.encode(batch)
        forward = counter.get_total_flops() + sparse
        (mean.sum() + logvar.sum()).backward()
    assert forward == model.latents_flops(len(batch), len(batch.counts))
    # The sparse product is done forward, and once more for the gradient of the tables; counts need none.
    trained = model.encoder.training_flops(len(batch), len(batch.counts))
    assert trained == counter.get_total_flops() + 2 * sparse


def test_grown_models_say_the_same_of_what_they_know_and_new_genes_change_nothing() -> None:
    old, dense = vae(), counts()
    grown = grow_vae(old, {"batch": 4}, torch.tensor([0.1, 0.2]))
    before = old.encode(cells(dense))
    new = torch.zeros(12, 2)
    torch.testing.assert_close(grown.encode(cells(torch.cat((dense, new), 1))), before)
    new[:, 0] = 5  # counted, but a gene that was never trained tells nothing
    torch.testing.assert_close(grown.encode(cells(torch.cat((dense, new), 1))), before, rtol=1e-3, atol=1e-4)


def test_a_new_gene_can_be_learned() -> None:
    grown = grow_vae(vae(), {"batch": 2}, torch.tensor([0.1])).train()
    dense = torch.cat((counts(), torch.full((12, 1), 3.0)), 1)
    grown(replace(cells(dense), step=100))["loss"].mean().backward()
    assert isinstance(grown.encoder, GeneSetEncoder)
    gradient = grown.encoder.genes.residual.grad
    assert gradient is not None
    new, known = gradient[-1].norm(), gradient[:-1].norm(dim=1).median()
    assert 0 < new < 300 * known  # it does not drown the others where gradients are clipped


@pytest.fixture(scope="module")
def run(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with it, trained through the command line."""
    out = tmp_path_factory.mktemp("gene_set") / "run"
    given = ["vae.encoder={name: gene_set, tokens: 5, width: 32, rows: 32}", "vae.latent_tokens=5"]
    done = bgen("train", "demo/vae", f"out={out}", f"data.store={demo.store}", *given, *QUICK)
    assert done.code == 0, done
    return out


def test_its_settings_are_exported_and_a_flow_trains_on_it(run: Path, bgen: Any, demo: Any, tmp_path: Path) -> None:
    written = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))["vae"]["encoder"]
    assert (written["name"], written["tokens"], written["weighting"]) == ("gene_set", 5, "molecules")
    assert isinstance(load_directory(run / "model").vae.encoder, GeneSetEncoder)
    backbone = "flow.backbone={name: hybrid, pattern: [tokens, none], width: 32, layers: 1, tokens: {count: 5}}"
    given = [f"out={tmp_path / 'flow'}", f"data.store={demo.store}", f"flow.vae={run}", "flow.conditions=[cell_type]"]
    done = bgen("train", "demo/flow", *given, backbone, *QUICK)
    assert done.code == 0, done
    done = bgen("generate", tmp_path / "flow" / "model", "--n", 20, "--out", tmp_path / "cells.h5ad")
    assert done.code == 0, done
    assert anndata.read_h5ad(tmp_path / "cells.h5ad").shape == (20, 120)


@pytest.mark.parametrize(
    "mode", [pytest.param("head", marks=pytest.mark.slow), pytest.param("lora", marks=pytest.mark.slow), "full"]
)
def test_finetuning_adds_genes_and_batches(run: Path, tune_with_new_genes: Any, mode: str) -> None:
    old, grown = tune_with_new_genes(run, mode)
    assert isinstance(old.encoder, GeneSetEncoder)
    assert isinstance(grown.encoder, GeneSetEncoder)
    assert (grown.encoder.genes.residual[120:].abs().amax(1) > 0).all()  # they started at zero and were trained
    assert torch.equal(grown.encoder.seed, old.encoder.seed) == (mode != "full")
    assert torch.equal(grown.encoder.read.value.weight, old.encoder.read.value.weight) == (mode == "head")


def test_bgen_plan_shares_the_tables_among_the_cells_of_a_micro_batch(bgen: Any) -> None:
    given = ["data.store=nowhere", "vae.encoder.name=gene_set", "train.global_batch=64", "train.micro_batch=16"]
    done = bgen("plan", "vae", *given, "--genes", 100, "--expressed", 20, "--gpu", "H100", "--json")
    assert done.code == 0, done
    model = VAE(load_config("vae", given).vae, 100, {})
    of_sixteen = model.encoder.training_flops(16, 16 * 20) + 3 * model.decoder.flops(16)
    assert json.loads(done.out)["flops_per_cell"] == of_sixteen // 16


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("{name: gene_set, width: 65}", "vae.encoder: width=65 is no multiple of heads=2"),
        ("{name: gene_set, attention: false}", "choose tokens=1 (it is 8)"),
        ("{name: gene_set, tokens: 6}", "latent_tokens: 4 does not divide the tokens of the encoder, 6"),
        ("{name: ranked}", "latent_tokens: encoder ranked has no tokens; set encoder.name=gene_set, or 1"),
        ("{name: gene_set, weighting: count}", "vae.encoder.weighting: Input should be 'molecules', 'log' or 'genes'"),
    ],
)
def test_mistakes_in_its_settings_are_named(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("vae", [f"vae.encoder={override}", "vae.latent_tokens=4"])
    assert said in str(caught.value)
