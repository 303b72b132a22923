from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bgen.config.flow import FlowConfig, SampleConfig
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.models.generators.conditions import ConditionEmbedding, drop_conditions
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE

G = 12


def cells(n: int, first: int = 0) -> CellBatch:
    counts = torch.poisson(torch.full((n, G), 3.0), generator=torch.Generator().manual_seed(first)) + 1
    keys = torch.arange(first, first + n)
    return CellBatch(
        torch.arange(n + 1) * G,
        torch.arange(G).repeat(n).int(),
        counts.flatten(),
        G,
        keys,
        keys,
        first_slot=first,
        obs={"cell_type": torch.arange(n) % 3 - 1, "dose": torch.arange(n) / n, "other": torch.zeros(n)},
    )


def flow(**changes: object) -> LatentFlow:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent=1, hidden=8), G, {})
    model = LatentFlow(
        FlowConfig(backbone={"width": 32, "layers": 2}).model_copy(update=changes),
        vae,
        {"cell_type": 2},
        {"dose": (0.5, 0.3)},
    )
    for name, parameter in model.backbone.named_parameters():  # what starts at zero hides what it is fed
        if "modulation" in name or "head" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def slice_of(batch: CellBatch, a: int, b: int) -> CellBatch:
    return replace(
        batch,
        indptr=batch.indptr[a : b + 1] - batch.indptr[a],
        indices=batch.indices[batch.indptr[a] : batch.indptr[b]],
        counts=batch.counts[batch.indptr[a] : batch.indptr[b]],
        keys=batch.keys[a:b],
        cells=batch.cells[a:b],
        first_slot=batch.first_slot + a,
        obs={name: column[a:b] for name, column in batch.obs.items()},
    )


@pytest.mark.parametrize("t_sampling", ["uniform", "stratified", "logit_normal"])
@pytest.mark.parametrize("training", [True, False])
def test_a_cell_does_not_feel_the_others_of_its_micro_batch(t_sampling: str, training: bool) -> None:
    model = flow(t_sampling=t_sampling).train(training)
    batch = cells(20)
    whole = model(batch)["loss"]
    parts = [model(slice_of(batch, a, b))["loss"] for a, b in [(0, 3), (3, 4), (4, 20)]]
    assert whole.shape == (20,)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_the_vae_is_frozen_saved_and_stays_in_evaluation() -> None:
    model = flow().train()
    assert not model.vae.training
    model(cells(8))["loss"].mean().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(name.startswith("vae.") for name in trained)
    assert all(model.get_parameter(name).grad is not None for name in trained)
    assert any(name.startswith("vae.encoder") for name in model.state_dict())


def test_samples_are_a_function_of_keys_and_conditions() -> None:
    model = flow().eval()
    keys = torch.arange(10)
    conditions = {"cell_type": torch.arange(10) % 2}
    settings = SampleConfig(steps=4, guidance=2.0)
    whole = model.sample(conditions, 10, keys, settings)
    assert whole.shape == (10, 2)
    part = model.sample({"cell_type": conditions["cell_type"][4:7]}, 3, keys[4:7], settings)
    torch.testing.assert_close(part, whole[4:7], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model.sample({}, 10, keys, settings), whole)


def test_guidance_one_is_conditional_and_zero_unconditional() -> None:
    model = flow().eval()
    keys = torch.arange(6)
    conditions = {"cell_type": torch.ones(6, dtype=torch.int64), "dose": torch.ones(6)}
    free = model.sample({}, 6, keys, SampleConfig(steps=3))
    assert torch.equal(model.sample(conditions, 6, keys, SampleConfig(steps=3, guidance=0.0)), free)
    assert not torch.allclose(model.sample(conditions, 6, keys, SampleConfig(steps=3, guidance=1.0)), free)


def test_each_condition_can_be_guided_by_itself() -> None:
    model = flow(condition_dropout_each=0.1).eval()
    keys = torch.arange(6)
    conditions = {"cell_type": torch.ones(6, dtype=torch.int64), "dose": torch.ones(6)}
    plain = model.sample(conditions, 6, keys, SampleConfig(steps=3))
    for name, other in (("cell_type", "dose"), ("dose", "cell_type")):
        without = model.sample({other: conditions[other]}, 6, keys, SampleConfig(steps=3))
        nothing = model.sample(conditions, 6, keys, SampleConfig(steps=3, guidance_of={name: 0.0}))
        torch.testing.assert_close(nothing, without, rtol=1e-4, atol=1e-5)
        more = model.sample(conditions, 6, keys, SampleConfig(steps=3, guidance_of={name: 3.0}))
        assert not torch.allclose(more, plain)
    with pytest.raises(UserError, match=r"no condition 'dosage' to be guided by. Did you mean 'dose'"):
        model.sample(conditions, 6, keys, SampleConfig(guidance_of={"dosage": 2.0}))


def test_guidance_needs_what_training_hid() -> None:
    keys = torch.arange(2)
    with pytest.raises(UserError, match="training hid all of them together only"):
        flow().eval().sample({}, 2, keys, SampleConfig(guidance_of={"dose": 2.0}))
    flow(condition_dropout=0.0).eval().sample({}, 2, keys, SampleConfig(guidance_of={"dose": 1.0}))  # asks for nothing
    with pytest.raises(UserError, match="training always told it the conditions"):
        flow(condition_dropout=0.0).eval().sample({}, 2, keys, SampleConfig(guidance=2.0))


def test_training_hides_each_condition_by_itself() -> None:
    keys = torch.arange(4000)
    together = drop_conditions(keys, 0.2, 0.0, 2)
    apart = drop_conditions(keys, 0.2, 0.3, 2)
    only = drop_conditions(keys, 0.2, 0.3, 1)  # of one condition either hides it
    assert only.shape == (4000, 1)
    assert only[together].all()
    assert abs(float(only[~together].float().mean()) - 0.3) < 0.03
    assert apart.shape == (4000, 2)
    assert apart[together].all()  # those of before are hidden whole, as they were
    others = apart[~together].float()
    assert torch.allclose(others.mean(0), torch.tensor([0.3, 0.3]), atol=0.03)
    assert abs(float(others.prod(1).mean()) - 0.09) < 0.02  # independently
    model, batch = flow(condition_dropout=0.0, condition_dropout_each=0.9).train(), cells(64)
    assert not torch.allclose(model(batch)["loss"], flow(condition_dropout=0.0).train()(batch)["loss"])


def test_noise_is_the_spread_that_generation_starts_from() -> None:
    model = flow().eval()
    torch.nn.init.zeros_(model.backbone.head.weight)  # nothing moves
    torch.nn.init.zeros_(model.backbone.head.bias)
    plain, wide = (model.sample({}, 6, torch.arange(6), SampleConfig(noise=noise)) for noise in (1.0, 1.5))
    torch.testing.assert_close(wide, 1.5 * plain)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
def test_a_fixed_library_is_met_exactly(solver: str) -> None:
    model = flow().eval()
    model.vae.latent_mean[-1], model.vae.latent_std[-1] = 4.0, 0.5
    wanted = torch.linspace(3.0, 5.0, 6)
    z = model.sample({}, 6, torch.arange(6), SampleConfig(solver=solver, steps=5, noise=1.2), log_library=wanted)
    torch.testing.assert_close(model.vae.unwhiten(z)[1], wanted, rtol=1e-5, atol=1e-5)


def test_unknown_conditions_are_named() -> None:
    model = flow().eval()
    with pytest.raises(UserError, match=r"condition 'celltype'.*Did you mean 'cell_type'"):
        model.sample({"celltype": torch.zeros(2, dtype=torch.int64)}, 2, torch.arange(2), SampleConfig())
    with pytest.raises(UserError, match="no column 'dose'"):
        model(replace(cells(2), obs={"cell_type": torch.zeros(2, dtype=torch.int64)}))


def test_hidden_conditions_are_the_same_as_unknown_or_absent_ones() -> None:
    torch.manual_seed(0)
    # 'keys' and 'type' are names of methods of torch's containers.
    embedding = ConditionEmbedding({"keys": 3, "type": 2}, {"dose": (1.0, 2.0)}, 8)
    given = {"keys": torch.tensor([0, 1]), "type": torch.tensor([1, 0]), "dose": torch.tensor([0.5, 1.5])}
    unknown = {"keys": torch.tensor([-1, -1]), "type": torch.tensor([-1, -1]), "dose": torch.tensor([torch.nan] * 2)}
    shown, hidden = torch.tensor([False, False]), torch.tensor([True, True])
    assert torch.equal(embedding(given, hidden), embedding({}, shown))
    assert torch.equal(embedding(given, hidden), embedding(unknown, shown))
    mixed = embedding(given, torch.tensor([True, False]))
    assert torch.equal(mixed[0], embedding({}, shown)[0])
    torch.testing.assert_close(mixed[1], embedding(given, shown)[1])
    embedding(unknown, shown).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in embedding.parameters())


def test_conditions_are_dropped_at_the_stated_rate() -> None:
    assert abs(drop_conditions(torch.arange(20_000), 0.15).float().mean() - 0.15) < 0.01
    assert not drop_conditions(torch.arange(100), 0.0).any()


def test_bf16_autocast_gives_a_float32_loss() -> None:
    model = flow()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(cells(16))["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(cells(16))["loss"], rtol=0.05, atol=0.05)


class KnownLatents(VAE):
    """A VAE whose latents are a known mixture: N(-1.5, 0.3^2) where cell_type is 0 and N(1.5, 0.3^2) where it is 1."""

    def latents(self, batch: CellBatch) -> Tensor:
        side = batch.obs["cell_type"].float() * 3 - 1.5
        return torch.stack((side + 0.3 * torch.randn(len(batch)), torch.randn(len(batch))), dim=1)


@pytest.mark.parametrize("prediction", ["velocity", pytest.param("data", marks=pytest.mark.slow)])
def test_the_flow_learns_a_mixture_in_latent_space(prediction: str) -> None:
    torch.manual_seed(0)
    vae = KnownLatents(VAEConfig(latent=1, hidden=8), G, {})
    model = LatentFlow(
        FlowConfig(backbone={"width": 48, "layers": 2}, prediction=prediction), vae, {"cell_type": 2}, {}
    )  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-3)
    batch = cells(256)
    steps = 500
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        batch.obs["cell_type"] = torch.randint(0, 2, (256,))
        model(replace(batch, keys=torch.arange(256) + 256 * step, step=step))["loss"].mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    keys = torch.arange(2000)
    free = model.sample({}, 2000, keys, SampleConfig())
    right = free[:, 0] > 0
    assert abs(right.float().mean() - 0.5) < 0.1
    for side, centre in [(right, 1.5), (~right, -1.5)]:
        # Medians, since a few of the samples lie between the components.
        median = free[side, 0].median()
        assert abs(median - centre) < 0.15
        assert abs((free[side, 0] - median).abs().median() / 0.6745 - 0.3) < 0.12
    assert abs(free[:, 1].std() - 1) < 0.12
    asked = model.sample({"cell_type": torch.ones(2000, dtype=torch.int64)}, 2000, keys, SampleConfig())
    assert (asked[:, 0] > 0).float().mean() > 0.97
