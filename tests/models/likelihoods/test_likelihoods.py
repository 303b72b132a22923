from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.models.likelihoods.negative_binomial import NegativeBinomial, ZeroInflatedNegativeBinomial
from bgen.models.likelihoods.sampling import sample_negative_binomial
from bgen.models.likelihoods.sparse import _gamma_ratio_slope, nonzero_term
from bgen.models.likelihoods.sparse_cpu import TABLED

B, G = 7, 23


def batch_of(counts: Tensor) -> CellBatch:
    rows, genes = counts.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts != 0).sum(dim=1).cumsum(0)))
    keys = torch.arange(len(counts))
    return CellBatch(indptr, genes.int(), counts[rows, genes], counts.shape[1], keys, keys)


def make(kind: str, dtype: torch.dtype, seed: int = 0, large: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    """Parameters (logits, log theta, dropout logits), library and counts."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, G, generator=generator, dtype=torch.float64)
    log_theta = (6 if large else 1.5) * torch.randn(G, generator=generator, dtype=torch.float64)
    dropout = 2 * torch.randn(B, G, generator=generator, dtype=torch.float64)
    library = torch.rand(B, generator=generator, dtype=torch.float64) * (50_000 if large else 200) + 5
    mean = torch.softmax(logits, 1) * library[:, None]
    counts = torch.poisson(mean, generator=generator) * (torch.rand(B, G, generator=generator) < 0.6)
    counts[3] = 0
    parameters = [logits, log_theta] + ([dropout] if kind == "zinb" else [])
    return [p.to(dtype).requires_grad_() for p in parameters], library.to(dtype), counts


def likelihood(parameters: list[Tensor], library: Tensor) -> NegativeBinomial:
    if len(parameters) == 2:
        return NegativeBinomial(parameters[0], library, parameters[1])
    return ZeroInflatedNegativeBinomial(parameters[0], library, parameters[1], parameters[2])


def scipy_log_prob(parameters: list[Tensor], library: Tensor, counts: Tensor) -> np.ndarray:
    logits, log_theta = (p.detach().double() for p in parameters[:2])
    mean = (torch.softmax(logits, 1) * library.double()[:, None]).numpy()
    theta = log_theta.clamp(-9, 14).exp().numpy()
    log_prob = stats.nbinom.logpmf(counts.numpy(), theta, theta / (theta + mean))
    if len(parameters) == 3:
        dropped = torch.sigmoid(parameters[2].detach().double()).numpy()
        log_prob = np.where(
            counts.numpy() == 0, np.log(dropped + (1 - dropped) * np.exp(log_prob)), np.log1p(-dropped) + log_prob
        )
    return log_prob


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_reference_equals_scipy(kind: str) -> None:
    parameters, library, counts = make(kind, torch.float64)
    dense = likelihood(parameters, library).log_prob(counts).detach().numpy()
    np.testing.assert_allclose(dense, scipy_log_prob(parameters, library, counts), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["nb", "zinb"])
@pytest.mark.parametrize("large", [False, True])
def test_sparse_equals_scipy_and_the_dense_reference_with_gradients(kind: str, large: bool) -> None:
    # In float64 the difference is that of the truncated series alone.
    parameters, library, counts = make(kind, torch.float64, large=large)
    weight = torch.rand(B, dtype=torch.float64)
    sparse = likelihood(parameters, library).log_prob_sparse(batch_of(counts))
    dense = likelihood(parameters, library).log_prob(counts).sum(dim=1)
    expected = scipy_log_prob(parameters, library, counts).sum(axis=1)
    np.testing.assert_allclose(sparse.detach().numpy(), expected, rtol=1e-7, atol=2e-6)
    gradients = torch.autograd.grad((sparse * weight).sum(), parameters)
    references = torch.autograd.grad((dense * weight).sum(), parameters)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nb", "zinb"])
@pytest.mark.parametrize("large", [False, True])
def test_float32_keeps_its_digits(kind: str, large: bool) -> None:
    exact, library, counts = make(kind, torch.float64, large=large)
    single = [p.detach().float().requires_grad_() for p in exact]
    a = likelihood(single, library.float()).log_prob_sparse(batch_of(counts.float()))
    b = likelihood(exact, library).log_prob(counts).sum(dim=1)
    assert a.dtype == torch.float32
    # A logarithm near 10 is known to 1e-6, and a count multiplies it.
    tolerance = 2e-6 * counts.sum(dim=1) + 1e-5 * b.abs()
    assert ((a - b).abs() < tolerance).all()
    for x, y in zip(torch.autograd.grad(a.sum(), single), torch.autograd.grad(b.sum(), exact), strict=True):
        assert ((x - y).abs() < 1e-5 * counts.max() + 1e-4 * y.abs() + 1e-5).all()


@pytest.mark.parametrize("log_theta", [-9.0, 0.0, 14.0])
@pytest.mark.parametrize("log_proportion", [-60.0, 0.0])
def test_extreme_parameters_stay_finite(log_theta: float, log_proportion: float) -> None:
    logits = torch.zeros(2, 3)
    logits[:, 0] = log_proportion
    logits.requires_grad_()
    theta = torch.full((3,), log_theta, requires_grad=True)
    counts = torch.tensor([[1.0, 0.0, 250_000.0], [0.0, 1.0, 0.0]])
    library = torch.tensor([250_001.0, 1.0])
    value = NegativeBinomial(logits, library, theta).log_prob_sparse(batch_of(counts))
    gradients = torch.autograd.grad(value.sum(), (logits, theta))
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    # scipy's own answer is -inf here: its p = theta / (theta + mu) rounds to 1.
    reference = NegativeBinomial(logits.double(), library.double(), theta.double()).log_prob(counts.double())
    torch.testing.assert_close(value.double(), reference.sum(dim=1), rtol=2e-6, atol=0.5)


def test_a_cell_without_counts_has_the_probability_of_zeros() -> None:
    logits = torch.randn(1, 5, requires_grad=True)
    value = NegativeBinomial(logits, torch.zeros(1), torch.zeros(5)).log_prob_sparse(batch_of(torch.zeros(1, 5)))
    assert abs(value.item()) < 1e-5
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.isfinite().all()


def test_term_of_a_nonzero_where_lgamma_loses_its_digits() -> None:
    theta = torch.tensor([1e-4, 0.3, 5.0, 1e3, 1e6])
    for x in (1.0, 2.0, 40.0, 3000.0):
        size, mean, count = theta.double(), torch.tensor(x + 2).double(), torch.full((5,), x).double()
        zero = -size * torch.log1p(mean / size)
        exact = torch.distributions.NegativeBinomial(size, logits=(mean / size).log()).log_prob(count) - zero
        log_mu = mean.log().float().expand(5)
        got = nonzero_term(count.float(), log_mu, torch.log1p(mean.float() / theta), theta)
        assert ((got - exact).abs() < 1e-6 * exact.abs() + 1e-6 * x + 1e-6).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_passes_equal_torchs(threads: int) -> None:
    # enough genes that three threads are worth it, counts on both sides of what is tabled
    generator = torch.Generator().manual_seed(1)
    cells, genes = 40, 6000
    logits = 2 * torch.randn(cells, genes, generator=generator)
    log_theta = 3 * torch.randn(genes, generator=generator)
    library = 20_000 * torch.rand(cells, generator=generator)
    counts = torch.poisson(torch.softmax(logits, 1) * library[:, None], generator=generator)
    assert ((counts > 1) & (counts < TABLED)).any()
    assert (counts > TABLED).any()
    weight = torch.randn(cells, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for dtype in (torch.float32, torch.float64):
            parameters = [p.to(dtype).requires_grad_() for p in (logits, log_theta)]
            value = likelihood(parameters, library.to(dtype)).log_prob_sparse(batch_of(counts))
            found.append([value.detach(), *torch.autograd.grad(value, parameters, weight.to(dtype))])
    finally:
        torch.set_num_threads(before)
    for compiled, reference in zip(*found, strict=True):
        torch.testing.assert_close(compiled.double(), reference, rtol=1e-4, atol=2e-5 * float(reference.abs().max()))


def test_a_logit_that_is_not_finite_is_not_hidden() -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 5)
        logits[1, 3] = bad
        value = NegativeBinomial(logits, torch.ones(2), torch.zeros(5)).log_prob_sparse(batch_of(torch.ones(2, 5)))
        assert value.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(("mu", "theta"), [(0.05, 0.3), (3.0, 1.0), (40.0, 5.0), (150.0, 1e6), (900.0, 2.0)])
def test_samples_follow_the_distribution(mu: float, theta: float) -> None:
    n = 40_000
    keys = torch.arange(n // 100) * 7 + 1
    drawn = sample_negative_binomial(torch.full((n // 100, 100), mu), torch.full((100,), theta), keys)
    assert drawn.dtype == torch.int32
    assert drawn.min() >= 0
    distribution = stats.nbinom(theta, theta / (theta + mu))
    quantiles = np.unique(distribution.ppf(np.linspace(0.02, 0.98, 20)))
    observed = np.array([(drawn.numpy() <= q).mean() for q in quantiles])
    expected = distribution.cdf(quantiles)
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-12).all()
    again = sample_negative_binomial(torch.full((3, 100), mu), torch.full((100,), theta), keys[[5, 2, 9]])
    assert torch.equal(again, drawn[[5, 2, 9]])


def test_zero_inflated_samples_have_the_stated_mean() -> None:
    parameters, library, _ = make("zinb", torch.float32)
    copies = [p.detach()[:1].expand(4000, G) if p.dim() == 2 else p.detach() for p in parameters]
    distribution = likelihood(copies, library[:1].expand(4000))
    drawn = distribution.sample(torch.arange(4000)).float()
    assert drawn.mean(0).sub(distribution.mean[0]).abs().le(6 * drawn.std(0) / 4000**0.5 + 0.01).all()


def test_half_precision_logits_are_evaluated_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parameters, library, counts = make("nb", torch.bfloat16)
        value = likelihood(parameters, library).log_prob_sparse(batch_of(counts.float()))
        value.sum().backward()
    assert value.dtype == torch.float32
    assert parameters[0].grad is not None


def test_slope_of_the_gamma_ratio_equals_digamma() -> None:
    theta = torch.logspace(-4, 4, 60, dtype=torch.float64)
    for x in (1.0, 3.0, 500.0):
        exact = theta * (torch.digamma(theta + x) - torch.digamma(theta)) - x
        slope = _gamma_ratio_slope(torch.full_like(theta, x), theta)
        assert ((slope - exact).abs() < 1e-7 * theta + 1e-9).all()


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_the_rate_behind_a_count_says_what_more_of_it_adds(kind: str) -> None:
    """The derivative of E[h(x)] by log mu is E[rate (h(x + 1) - h(x))], summed here over the counts that there are."""
    parameters, library, _ = make(kind, torch.float64)
    parameters = [p.detach() for p in parameters]
    parameters[1] = parameters[1].clamp_min(0)
    library = library / 20  # 400 counts are all that can be

    def expected(scale: float) -> Tensor:
        shown = likelihood(parameters, library * scale)
        return sum(math.log1p(3 * x) * shown.log_prob(torch.full((B, G), float(x))).exp() for x in range(1, 400))

    shown = likelihood(parameters, library)
    by_rate = torch.zeros(B, G, dtype=torch.float64)
    for x in range(400):
        counts = torch.full((B, G), float(x), dtype=torch.float64)
        gain = math.log1p(3 * (x + 1)) - math.log1p(3 * x)
        by_rate += shown.log_prob(counts).exp() * shown.rate_given(counts) * gain
    torch.testing.assert_close(by_rate, (expected(1.001) - expected(0.999)) / 0.002, rtol=1e-4, atol=1e-6)
