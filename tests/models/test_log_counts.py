"""Log counts as the space of a flow: a cell comes back as it was, and counts are drawn as the settings say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bgen.config.flow import FlowConfig, LogCountsConfig, SampleConfig
from bgen.data.batch import CellBatch
from bgen.models.codec import log_library
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.log_counts import LEAST, LogCounts

G = 12


def cells(counts: Tensor) -> CellBatch:
    rows, genes = counts.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts != 0).sum(1).cumsum(0)))
    numbers = torch.arange(len(counts))
    return CellBatch(indptr, genes.int(), counts[rows, genes].float(), counts.shape[1], numbers, numbers)


def some(n: int = 500, seed: int = 0) -> Tensor:
    """Counts of genes that differ in mean by three orders of magnitude, of cells that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.logspace(-1.5, 1.5, G) * torch.empty(n, 1).uniform_(0.3, 3.0, generator=generator)
    return torch.poisson(means, generator=generator)


def fitted(cells_of: Tensor, **settings: Any) -> LogCounts:
    codec = LogCounts(LogCountsConfig(**settings), cells_of.shape[1])
    stats = codec.whitening_stats()
    for part in cells_of.split(200):
        codec.accumulate_whitening(stats, cells(part))
    codec.fit_whitening(stats)
    return codec


@pytest.mark.parametrize("scale", ["one", "gene"])
def test_a_cell_comes_back_with_its_counts(scale: str) -> None:
    counts = torch.cat((some(), torch.zeros(1, G)))  # also a cell without any
    counts[3] *= 10_000
    codec = fitted(counts, scale=scale)
    batch = cells(counts)
    state, size = codec.unwhiten(codec.latents(batch))
    torch.testing.assert_close(size, log_library(batch))
    again = codec.decode(state, size.exp(), {}).sample(batch.keys)
    assert torch.equal(again[:-1], counts[:-1].int())
    mean, logvar = codec.encode(batch)
    assert torch.equal(logvar.exp(), torch.zeros_like(mean))
    torch.testing.assert_close(mean, state, atol=1e-5, rtol=1e-5)
    assert not list(codec.parameters())


def test_genes_have_one_scale_or_their_own() -> None:
    counts = some()
    one, own = (fitted(counts, scale=scale).latents(cells(counts)) for scale in ("one", "gene"))
    for whitened in (one, own):
        torch.testing.assert_close(whitened.mean(0), torch.zeros(G + 1), atol=1e-3, rtol=0)
        assert whitened[:, -1].std(correction=0) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(own.std(0, correction=0), torch.ones(G + 1), atol=1e-3, rtol=0)
    spread = one[:, :-1].var(0, correction=0)
    assert float(spread.mean()) == pytest.approx(1, abs=1e-3)
    assert float(spread.max()) > 2 * float(spread.min())


def test_dispersions_are_those_of_the_counts_that_they_come_from() -> None:
    torch.manual_seed(0)
    n, theta = 40_000, torch.tensor([0.5, 2.0, 8.0, torch.inf])
    library = torch.empty(n, 1).uniform_(20.0, 60.0)
    rates = library * torch.tensor([0.1, 0.2, 0.3, 0.4, 50.0])  # the last makes the size, almost alone
    rates[:, :3] *= torch.distributions.Gamma(theta[:3], theta[:3]).sample((n,))
    counts = torch.poisson(rates)
    batch = cells(counts)
    codec = LogCounts(LogCountsConfig(counts="nb"), 5)
    stats = codec.whitening_stats()
    codec.accumulate_whitening(stats, batch)
    found = stats.log_theta().exp()
    torch.testing.assert_close(found[:3], theta[:3], rtol=0.15, atol=0)
    assert found[3] > 50
    codec.fit_whitening(stats)
    assert torch.equal(codec.log_theta, stats.log_theta())
    poisson = LogCounts(LogCountsConfig(counts="poisson"), 5)
    poisson.fit_whitening(stats)
    assert (poisson.log_theta == 14).all()


def test_counts_are_rounded_or_drawn() -> None:
    counts = some(2000)
    counts[::2, 8] *= 4  # cells differ in this gene by more than chance
    shares = counts.mean(0) / counts.mean(0).sum()
    state = torch.log1p(1e4 * shares).expand(4000, G)
    library, keys = torch.full((4000,), 100.0), torch.arange(4000)
    drawn = {name: fitted(counts, counts=name).decode(state, library, {}) for name in ("rounded", "poisson", "nb")}
    expected = 100 * shares
    for likelihood in drawn.values():
        torch.testing.assert_close(likelihood.mean[0], expected, atol=1e-3, rtol=1e-4)
    made = {name: likelihood.sample(keys).double() for name, likelihood in drawn.items()}
    assert all(torch.equal(values, values.round()) for values in made.values())
    assert torch.equal(made["rounded"], expected.round().double().expand(4000, G))
    means = {name: values.mean(0) for name, values in made.items()}
    torch.testing.assert_close(means["poisson"], expected.double(), rtol=0.1, atol=0.02)
    spread = {name: float(values[:, 8].var()) for name, values in made.items()}
    assert spread["poisson"] == pytest.approx(float(expected[8]), rel=0.1)
    assert spread["nb"] > 1.1 * spread["poisson"]


def test_states_that_no_counts_have_are_taken_as_the_nearest() -> None:
    codec = fitted(some())
    state = torch.full((3, G), -5.0)
    state[1, 2] = 200.0
    state[2, :2] = torch.tensor([1.0, 2.0])
    likelihood = codec.decode(state, torch.full((3,), 50.0), {})
    assert likelihood.logits.isfinite().all()
    mean = likelihood.mean
    torch.testing.assert_close(mean.sum(1), torch.full((3,), 50.0))
    torch.testing.assert_close(mean[0], torch.full((G,), 50.0 / G))  # nothing is known of it
    assert mean[1, 2] == pytest.approx(50)
    assert mean[2, 2] < 50 * LEAST


def test_levels_multiply_expectations() -> None:
    counts = some()
    codec = fitted(counts)
    batch = cells(counts)
    before = codec.decode(codec.states(batch), batch.library, {}).mean
    by = torch.zeros(G)
    by[5] = 0.5
    codec.shift_genes(by)
    after = codec.decode(codec.states(batch), batch.library, {}).mean
    ratio = after / before.clamp_min(1e-12)
    torch.testing.assert_close(ratio[:, 5] / ratio[:, 6], torch.full((len(counts),), 0.5).exp(), rtol=1e-3, atol=0)


def test_a_flow_on_log_counts_learns_the_gene_that_tells_types_apart() -> None:
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((400, G), 5.0))
    kind = torch.arange(400) % 2
    counts[:, 0] = torch.poisson(torch.where(kind == 0, 1.0, 60.0))
    codec = fitted(counts)
    flow = LatentFlow(FlowConfig(backbone={"width": 64, "layers": 2}), codec, {"kind": 2}, {})
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], 3e-3)
    batch = replace(cells(counts), obs={"kind": kind})
    for step in range(200):
        optimizer.zero_grad()
        flow(replace(batch, keys=batch.keys + 400 * step, step=step))["loss"].mean().backward()
        optimizer.step()
    asked = torch.arange(200) % 2
    made = flow.eval().sample({"kind": asked}, 200, torch.arange(200), SampleConfig(steps=8))
    state, size = flow.vae.unwhiten(made)
    drawn = flow.vae.decode(state, size.exp(), {}).sample(torch.arange(200)).double()
    assert drawn[asked == 1, 0].mean() == pytest.approx(60, rel=0.25)
    assert drawn[asked == 0, 0].mean() < 10


def test_blocks_of_genes_may_be_tokens() -> None:
    counts = some(20)
    settings = {"name": "hybrid", "pattern": ["tokens", "none"], "tokens": {"count": 3}, "width": 32, "layers": 1}
    config = FlowConfig(backbone={**settings, "attention": {"heads": 2}})
    flow = LatentFlow(config, fitted(counts), {}, {})
    flow(cells(counts))["loss"].mean().backward()
    assert flow.sample({}, 5, torch.arange(5), SampleConfig(steps=1)).shape == (5, G + 1)
