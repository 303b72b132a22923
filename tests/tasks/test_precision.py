"""A model that computes in bfloat16: where it does, where it does not, and how little that changes the cells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import nn

import bgen as library
from bgen.errors import UserError
from bgen.models.generators.latent_flow import LatentFlow
from bgen.nn.precision import computing, precision_of
from bgen.order.keys import hash_keys
from bgen.tasks.anndata_model import cell_batch
from bgen.tasks.load import Model
from bgen.tasks.perturb.rank import energy

CPU = torch.device("cpu")
MODELS = Path(__file__).parents[1] / "hub" / "fixtures_0_1_0"
"""Small trained models, and cells for them."""


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    table = pd.read_csv(MODELS / "cells.csv", index_col=0)
    genes = [name for name in table.columns if name.startswith("G")]
    counts = sp.csr_matrix(table[genes].to_numpy(np.float32))
    return anndata.AnnData(counts, obs=table.drop(columns=genes), var=pd.DataFrame(index=genes))


@pytest.fixture(scope="module")
def wide(cells: anndata.AnnData) -> Model:
    """A flow that has learnt enough to move cells: the one in the folder was trained for a few steps."""
    model = library.load(MODELS / "flow")
    read = model.read(cells)
    batch, flow = cell_batch(read.counts, read.columns, 0), model.saved.module
    assert isinstance(flow, LatentFlow)
    optimiser = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], 3e-3)
    flow.train()
    for step in range(150):
        batch.keys = torch.from_numpy(hash_keys(step, np.arange(len(batch))).view(np.int64))
        loss = flow(batch)["loss"].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    flow.eval()
    return model


@pytest.fixture(scope="module")
def narrow(wide: Model) -> Model:
    return Model(replace(wide.saved, precision="bf16"))


@contextmanager
def products(module: nn.Module) -> Iterator[dict[str, set[torch.dtype]]]:
    """Gather what the linear layers of each part of a flow give, by the part's name."""
    found: dict[str, set[torch.dtype]] = {}
    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            whose = next((key for key in ("vae.encoder", "vae.decoder", "backbone") if name.startswith(key)), "other")
            dtypes = found.setdefault(whose, set())
            hooks.append(part.register_forward_hook(lambda _, __, out, dtypes=dtypes: dtypes.add(out.dtype)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def test_the_flow_computes_in_bfloat16_and_the_decoder_does_not(narrow: Model, wide: Model) -> None:
    for model, dtype in ((narrow, torch.bfloat16), (wide, torch.float32)):
        with products(model.saved.module) as found:
            made = model.generate(40, seed=1)
        assert dtype in found["backbone"]
        assert found["vae.decoder"] == {torch.float32}
        assert made.uns["bgen"]["precision"] == ("bf16" if model is narrow else "float32")
        assert made.X.dtype == np.float32
        assert (made.X.data == made.X.data.round()).all()


def test_the_solver_keeps_its_state_in_float32(narrow: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    states = set()
    flow = narrow.saved.module
    velocity = flow.velocity

    def seen(z: torch.Tensor, *rest: Any) -> torch.Tensor:
        v = velocity(z, *rest)
        states.update((z.dtype, v.dtype))
        return v

    monkeypatch.setattr(flow, "velocity", seen)
    for solver in ("euler", "heun", "midpoint", "adaptive"):
        narrow.generate(40, solver=solver, guidance=1.0, seed=1)
    assert states == {torch.float32}


def test_the_encoder_computes_in_bfloat16(narrow: Model, wide: Model, cells: anndata.AnnData) -> None:
    with products(narrow.saved.module) as found:
        mean, variance = narrow.encode(cells)
    assert torch.bfloat16 in found["vae.encoder"]
    assert mean.dtype == variance.dtype == np.float32
    exact, _ = wide.encode(cells)
    assert np.abs(mean - exact).max() > 0
    assert np.abs(mean - exact).mean() < 0.02 * exact.std()


def test_the_decoder_gives_the_same_in_both(narrow: Model, wide: Model) -> None:
    z = np.random.default_rng(0).normal(size=(50, wide.saved.codec.size - 1)).astype(np.float32)
    size = np.full(50, 1000, np.float32)
    np.testing.assert_array_equal(narrow.decode(z, size), wide.decode(z, size))


def test_cells_made_in_bfloat16_are_like_those_made_in_float32(narrow: Model, wide: Model) -> None:
    one, exact, other = narrow.generate(600, seed=3), wide.generate(600, seed=3), wide.generate(600, seed=4)
    assert one.obs.equals(exact.obs)
    logs = [torch.from_numpy(np.log1p(made.X.toarray())) for made in (one, exact, other)]
    spread = (logs[1] - logs[1].mean(0)).norm(dim=1).mean()
    # The cells are paired: they start from the same noise, so they differ far less than two seeds do.
    apart, seeds = ((x - logs[1]).norm(dim=1).mean() for x in (logs[0], logs[2]))
    assert 0 < apart < 0.1 * seeds
    assert abs(energy(logs[0], logs[1])) < 0.01 * spread
    totals = [made.X.sum() for made in (one, exact)]
    assert totals[0] == pytest.approx(totals[1], rel=0.01)
    means = [np.asarray(made.X.mean(0)).ravel() for made in (one, exact)]
    known = means[1] > 0.5
    np.testing.assert_allclose(means[0][known], means[1][known], rtol=0.05)


def test_float32_is_the_default_and_leaves_the_autocast_around_as_it_is(wide: Model) -> None:
    assert wide.saved.precision == "float32"
    with torch.autocast("cpu", torch.bfloat16), computing(CPU, "float32"):
        assert torch.is_autocast_enabled("cpu")
    with computing(CPU, "float32"):
        assert not torch.is_autocast_enabled("cpu")


def test_a_precision_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"There is no precision 'fp16': it is float32 or bf16\."):
        library.load(MODELS / "flow", precision="fp16")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: computing(CPU, "float32"))
    with pytest.raises(UserError, match="this torch does not compute in bfloat16 on cpu"):
        precision_of("bf16", CPU)
    assert precision_of("float32", CPU) == "float32"


def test_courses_and_what_is_between_are_made_in_bfloat16(cells: anndata.AnnData) -> None:
    for name in ("course", "time"):
        made = {}
        for precision in ("bf16", "float32"):
            model = library.load(MODELS / name, precision=precision)
            with products(model.saved.module) as found:
                parts = [model.interpolate(cells, 24.0, n=40, seed=1), model.forecast(cells, 48.0, n=40, seed=1)]
                parts += [model.generate(8, times="all", seed=1)] if name == "course" else []
            assert (torch.bfloat16 in found["backbone"]) == (precision == "bf16")
            assert found["vae.decoder"] == {torch.float32}
            made[precision] = np.concatenate([part.X.toarray() for part in parts])
        np.testing.assert_allclose(made["bf16"].mean(), made["float32"].mean(), rtol=0.05)


def test_the_verbs_take_a_precision(bgen: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "my.h5ad")
    verbs = {
        "generate": ["--n", "20"],
        "embed": [tmp_path / "my.h5ad"],
        "denoise": [tmp_path / "my.h5ad"],
        "integrate": [tmp_path / "my.h5ad"],
    }
    for verb, asked in verbs.items():
        out = tmp_path / f"{verb}.h5ad"
        told = bgen(verb, MODELS / "flow", *asked, "--out", out, "--precision", "bf16", "--device", "cpu")
        assert told.code == 0, told
    assert anndata.read_h5ad(tmp_path / "generate.h5ad").uns["bgen"]["precision"] == "bf16"


@pytest.mark.parametrize(
    "verb",
    [
        "generate",
        "embed",
        "annotate",
        "denoise",
        "integrate",
        "interpolate",
        "forecast",
        "perturb",
        "screen",
        "evaluate",
    ],
)
def test_every_verb_says_that_it_does_not_know_a_precision(verb: str, bgen: Any, tmp_path: Path) -> None:
    cells = tmp_path / "my.h5ad"
    asked = {
        "generate": [],
        "evaluate": ["--data", tmp_path / "store"],
        "perturb": [cells, "--perturbation", "x"],
        "screen": [cells, "--towards", "cell_type=B"],
        "interpolate": [cells, "--time", "1"],
        "forecast": [cells, "--time", "1"],
    }.get(verb, [cells])
    told = bgen(verb, MODELS / "flow", *asked, "--out", tmp_path / "out.h5ad", "--precision", "half")
    assert told.code == 2
    assert "There is no precision 'half': it is float32 or bf16." in told.err


def test_blocks_are_made_in_the_precision_that_is_asked_for(bgen: Any, cells: anndata.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "my.h5ad")
    states = []
    for precision in ("float32", "bf16"):
        out = tmp_path / f"{precision}.zarr"
        asked = [tmp_path / "my.h5ad", "--out", out, "--precision", precision, "--device", "cpu"]
        told = bgen("embed", MODELS / "flow", *asked)
        assert told.code == 0, told
        states.append(anndata.read_zarr(out).obsm["X_bgen"])
    assert 0 < np.abs(states[0] - states[1]).mean() < 0.02 * states[0].std()
