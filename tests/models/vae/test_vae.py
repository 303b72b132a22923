from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.models.codec import log_library
from bgen.models.likelihoods.negative_binomial import NegativeBinomial
from bgen.models.vae.thinning import KEPT, binomial, thin
from bgen.models.vae.vae import VAE
from bgen.nn.random import uniform


def batch_of(counts: Tensor, first_key: int = 0, obs: dict[str, Tensor] | None = None) -> CellBatch:
    rows, genes = counts.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts != 0).sum(dim=1).cumsum(0)))
    keys = torch.arange(len(counts)) + first_key
    return CellBatch(indptr, genes.int(), counts[rows, genes], counts.shape[1], keys, keys, obs=obs or {})


def take(counts: Tensor, batch: CellBatch, rows: slice) -> CellBatch:
    part = batch_of(counts[rows], obs={name: column[rows] for name, column in batch.obs.items()})
    return replace(part, keys=batch.keys[rows], cells=batch.cells[rows], step=batch.step, first_slot=rows.start)


def low_rank_counts(n: int, seed: int, genes: int = 60) -> Tensor:
    """NB counts of three programmes, with log-normal library size."""
    world = torch.Generator().manual_seed(99)
    programmes = 1.2 * torch.randn(3, genes, generator=world)
    base = torch.randn(genes, generator=world)
    generator = torch.Generator().manual_seed(seed)
    logits = base + torch.randn(n, 3, generator=generator) @ programmes
    library = torch.exp(5.5 + 0.5 * torch.randn(n, generator=generator))
    mean = torch.softmax(logits, 1) * library[:, None]
    gamma = torch.from_numpy(stats.gamma(3.0).rvs((n, genes), random_state=seed)).float()
    return torch.poisson(mean * gamma / 3.0, generator=generator)


COUNTS = low_rank_counts(24, 1)
OBS = {"batch": torch.arange(24) % 4 - 1}
CONFIG = VAEConfig(latent=4, hidden=32, covariates=["batch"])


def model(likelihood: str = "nb", **changes: object) -> VAE:
    torch.manual_seed(0)
    return VAE(CONFIG.model_copy(update={"likelihood": likelihood, **changes}), 60, {"batch": 3})


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("training", [True, False])
def test_a_cell_does_not_feel_the_others_of_its_micro_batch(likelihood: str, training: bool) -> None:
    vae = model(likelihood).train(training)
    batch = replace(batch_of(COUNTS, obs=OBS), step=100)
    whole = vae(batch)
    parts = [vae(take(COUNTS, batch, slice(a, b))) for a, b in [(0, 5), (5, 6), (6, 24)]]
    for name, values in whole.items():
        assert values.shape == (24,)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values, rtol=1e-6, atol=1e-5)


def test_loss_is_nll_plus_warmed_up_kl_with_free_bits() -> None:
    vae = model(kl_warmup=10, kl_weight=0.5, free_bits=0.3, dropout=0.0, thinning=0.0)
    batch = batch_of(COUNTS, obs=OBS)
    mean, logvar = vae.encode(batch)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    for step, weight in [(0, 0.0), (4, 0.2), (10, 0.5), (500, 0.5)]:
        out = vae(replace(batch, step=step))
        torch.testing.assert_close(out["kl"], kl.sum(1))
        torch.testing.assert_close(out["loss"], out["nll"] + weight * (kl - 0.3).clamp_min(0).sum(1))
    vae.eval()
    out = vae(batch)
    torch.testing.assert_close(out["loss"], out["nll"] + 0.5 * (kl - 0.3).clamp_min(0).sum(1))


def test_evaluation_neither_thins_nor_drops_and_training_does() -> None:
    vae = model(thinning=0.9)
    batch = batch_of(COUNTS, obs=OBS)
    trained = vae(batch)["nll"]
    vae.eval()
    mean, logvar = vae.encode(batch)
    z = vae.posterior_sample(mean, logvar, batch.keys)
    exact = -vae.decode(z, batch.library, batch.obs).log_prob(COUNTS).sum(1)
    torch.testing.assert_close(vae(batch)["nll"], exact, rtol=1e-5, atol=1e-3)
    assert not torch.allclose(trained, exact, rtol=1e-3)


def test_encoder_input_is_log1p_of_counts_per_ten_thousand() -> None:
    vae = model().eval()
    batch = batch_of(COUNTS, obs=OBS)
    encoder = vae.encoder
    x = torch.log1p(COUNTS / COUNTS.sum(1, keepdim=True) * 1e4)
    hidden = x @ encoder.weight + encoder.bias + encoder.covariates.tables[0](OBS["batch"])
    hidden = torch.nn.functional.silu(hidden)
    for block in encoder.blocks:
        hidden = block(hidden, None)
    torch.testing.assert_close(encoder.head(encoder.norm(hidden))[:, :4], vae.encode(batch)[0], rtol=1e-4, atol=1e-5)


def test_unknown_covariate_adds_nothing_and_a_missing_one_is_named() -> None:
    vae = model().eval()
    z, library = torch.randn(2, 4), torch.full((2,), 100.0)
    unknown = vae.decode(z, library, {"batch": torch.tensor([-1, -1])}).mean
    assert torch.equal(unknown, vae.decode(z, library, {}).mean)
    assert not torch.allclose(unknown, vae.decode(z, library, {"batch": torch.tensor([1, 1])}).mean)
    with pytest.raises(UserError, match=r"covariate 'batch'.*Did you mean 'Batch'"):
        vae(batch_of(COUNTS, obs={"Batch": OBS["batch"]}))


def test_whitening_standardises_posterior_samples_and_limits_the_library() -> None:
    vae = model().eval()
    batch = batch_of(COUNTS, obs=OBS)
    merged, other = vae.whitening_stats(), vae.whitening_stats()
    vae.accumulate_whitening(merged, take(COUNTS, batch, slice(0, 9)))
    vae.accumulate_whitening(other, take(COUNTS, batch, slice(9, 24)))
    merged.sums += other.sums
    merged.bounds = torch.maximum(merged.bounds, other.bounds)
    vae.fit_whitening(merged)
    whitened = vae.latents(batch)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(whitened.std(0, unbiased=False), torch.ones(5), atol=1e-4, rtol=0)
    z, log_size = vae.unwhiten(whitened)
    torch.testing.assert_close(log_size, log_library(batch))
    torch.testing.assert_close(vae.whiten(z, log_size), whitened, atol=1e-5, rtol=1e-5)
    wild = vae.unwhiten(whitened * 1000)[1]
    assert wild.max() <= COUNTS.sum(1).max().log() + 0.101
    assert wild.min() >= COUNTS.sum(1).min().log() - 0.101


def test_state_dict_carries_the_whitening() -> None:
    vae, copy = model(), model()
    stats_ = vae.whitening_stats()
    vae.accumulate_whitening(stats_, batch_of(COUNTS, obs=OBS))
    vae.fit_whitening(stats_)
    copy.load_state_dict(vae.state_dict())
    assert torch.equal(copy.latent_std, vae.latent_std)
    assert torch.equal(copy.log_library_range, vae.log_library_range)


def test_thinning_is_binomial_keyed_and_leaves_the_share_alone() -> None:
    counts = torch.full((400, 50), 7.0)
    counts[:, 25:] = 200.0
    batch = batch_of(counts, first_key=5)
    thinned = thin(batch, 0.5).view(400, 50)
    untouched = (thinned == counts).all(dim=1)
    assert 0.42 < untouched.float().mean() < 0.58
    fraction = thinned[~untouched] / counts[~untouched]
    small, large = fraction[:, :25].mean(1), fraction[:, 25:].mean(1)
    assert (small - large).abs().max() < 5 * (0.25 / (7 * 25)) ** 0.5
    assert large.min() > KEPT[0] - 0.05
    assert abs(large.mean() - 0.65) < 0.05
    part = take(counts, batch, slice(30, 60))
    assert torch.equal(thin(part, 0.5).view(30, 50), thinned[30:60])
    # A gene's draw does not depend on the other genes of the cell.
    fewer = counts.clone()
    fewer[:, :10] = 0
    assert torch.equal(thin(batch_of(fewer, first_key=5), 0.5).view(400, 40), thinned[:, 10:])


@pytest.mark.parametrize(("n", "p"), [(1, 0.3), (5, 0.01), (32, 0.69), (33, 0.3), (2000, 0.5)])
def test_binomial_follows_the_distribution(n: int, p: float) -> None:
    size = 40_000
    u = uniform(torch.arange(size), 1, 1).squeeze(1)
    drawn = binomial(torch.full((size,), float(n)), torch.full((size,), p), u)
    assert drawn.min() >= 0
    assert drawn.max() <= n
    assert torch.equal(drawn, drawn.round())
    observed = [(drawn <= k).float().mean().item() for k in range(n + 1)]
    # The normal approximation, above 32, is off by up to 0.02 in the distribution function.
    allowed = 5 * 0.5 / size**0.5 + (0.02 if n > 32 else 0.0)
    assert max(abs(a - b) for a, b in zip(observed, stats.binom(n, p).cdf(range(n + 1)), strict=True)) < allowed


def test_initialised_genes_decode_to_their_mean_proportions() -> None:
    vae = model().eval()
    torch.nn.init.zeros_(vae.decoder.logits.weight)
    vae.initialise_genes(COUNTS.mean(0))
    mean = vae.decode(torch.randn(1, 4), torch.tensor([100.0]), {}).mean[0]
    torch.testing.assert_close(mean, 100 * COUNTS.mean(0) / COUNTS.mean(0).sum(), atol=1e-4, rtol=1e-3)


def test_bf16_autocast_trains_with_the_likelihood_in_float32() -> None:
    vae = model("zinb")
    batch = batch_of(COUNTS, obs=OBS)
    full = vae(batch)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = vae(batch)["loss"]
        half.mean().backward()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def per_gene_nll(train: Tensor, test: Tensor) -> float:
    """Held-out NLL of one NB per gene with library scaling, dispersion fitted by maximum likelihood."""
    proportions = train.sum(0) / train.sum()
    total = 0.0
    for g in range(train.shape[1]):
        mean = (proportions[g] * train.sum(1)).double().numpy()

        def nll(log_theta: float, g: int = g, mean: object = mean) -> float:
            theta = float(torch.tensor(log_theta).exp())
            return -float(stats.nbinom.logpmf(train[:, g].numpy(), theta, theta / (theta + mean)).sum())

        theta = float(torch.tensor(optimize.minimize_scalar(nll, bounds=(-5, 6), method="bounded").x).exp())
        held_out = (proportions[g] * test.sum(1)).double().numpy()
        total -= float(stats.nbinom.logpmf(test[:, g].numpy(), theta, theta / (theta + held_out)).mean())
    return total


def test_training_beats_a_negative_binomial_per_gene_on_held_out_cells() -> None:
    train, test = low_rank_counts(1500, 2), low_rank_counts(400, 3)
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent=6, hidden=64, kl_warmup=100), 60, {})
    vae.initialise_genes(train.mean(0))
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for step in range(200):
        rows = torch.randint(0, 1500, (256,))
        vae(replace(batch_of(train[rows], first_key=step * 256), step=step))["loss"].mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    vae.eval()
    baseline = per_gene_nll(train, test)
    out = vae(batch_of(test))
    assert out["nll"].mean() < baseline - 5
    # The bound itself, with the whole KL paid, is better too.
    assert (out["nll"] + out["kl"]).mean() < baseline
    stats_ = vae.whitening_stats()
    vae.accumulate_whitening(stats_, batch_of(train))
    vae.fit_whitening(stats_)
    z, size = vae.unwhiten(torch.randn(50, 7))
    drawn = vae.decode(z, size.exp(), {}).sample(torch.arange(50))
    assert isinstance(vae.decode(z, size.exp(), {}), NegativeBinomial)
    assert drawn.dtype == torch.int32
    assert drawn.min() >= 0
    assert 0.7 < drawn.sum(1).float().mean() / size.exp().mean() < 1.3


def fitted(vae: VAE, batch: CellBatch, steps: int) -> VAE:
    for _ in range(steps):
        stats = vae.level_stats()
        vae.accumulate_levels(stats, batch)
        vae.fit_levels(stats)
    return vae


def untrained(likelihood: str, counts: Tensor) -> VAE:
    """A VAE whose levels are off: by those of the cells' average, and by what its random weights add."""
    vae = model(likelihood).eval()
    vae.initialise_genes(counts.mean(0))
    vae.decoder.shift_genes(0.3 * torch.randn(60, generator=torch.Generator().manual_seed(1)))
    return vae


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_no_other_levels_explain_the_cells_better(likelihood: str) -> None:
    counts = low_rank_counts(2000, 3)
    batch = batch_of(counts, obs={"batch": torch.arange(2000) % 3})
    vae = untrained(likelihood, counts)

    @torch.no_grad()
    def nll() -> float:
        return float(vae(batch)["nll"].double().mean())

    before = nll()
    fitted(vae, batch, 3)
    best = nll()
    assert best < before - 0.5
    for move in torch.randn(4, 60, generator=torch.Generator().manual_seed(2)):
        vae.decoder.shift_genes(0.05 * move)
        assert nll() > best
        vae.decoder.shift_genes(-0.05 * move)


def test_drawn_cells_have_the_measured_means() -> None:
    counts = low_rank_counts(4000, 3)
    batch = batch_of(counts, obs={"batch": torch.full((4000,), -1)})

    def off(vae: VAE) -> Tensor:
        mean, logvar = vae.encode(batch)
        drawn = vae.decode(vae.posterior_sample(mean, logvar, batch.keys), batch.library, {}).mean
        return (drawn.mean(0) / counts.mean(0)).log().abs().mean()

    with torch.no_grad():
        before = off(untrained("nb", counts))
        assert off(fitted(untrained("nb", counts), batch, 3)) < 0.3 * before


def test_ranks_add_up() -> None:
    whole, parts = model().eval(), model().eval()
    batch = batch_of(COUNTS, obs=OBS)
    fitted(whole, batch, 1)
    first, second = parts.level_stats(), parts.level_stats()
    parts.accumulate_levels(first, take(COUNTS, batch, slice(0, 9)))
    parts.accumulate_levels(second, take(COUNTS, batch, slice(9, 24)))
    first.sums += second.sums
    parts.fit_levels(first)
    torch.testing.assert_close(parts.decoder.logits.bias, whole.decoder.logits.bias)


def test_a_gene_that_nobody_counts_hardly_moves() -> None:
    counts = COUNTS.clone()
    counts[:, 7] = 0
    vae = model().eval()
    vae.initialise_genes(counts.mean(0))
    before = vae.decoder.logits.bias[7].item()
    fitted(vae, batch_of(counts, obs=OBS), 3)
    assert vae.decoder.logits.bias[7].item() == pytest.approx(before, abs=0.01)
