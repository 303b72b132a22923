"""Sets of members with amounts as a condition: what they mean, and how they grow."""

from __future__ import annotations

import torch

from bgen.config.flow import FlowConfig, MemberSizes
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.generators.members import MemberEmbedding, Members
from bgen.models.grow import grow_flow, grow_members, grow_vae
from bgen.models.vae.vae import VAE, VAEConfig

SIZES = MemberSizes(members=3, labels=4, largest=2, names=6, vector=2, amount="dose", forget=0.5)


def told(own: list[list[int]], vector: list[list[int]], amount: float = torch.nan) -> Members:
    rows = torch.tensor(own)
    there = (rows >= 0) | (torch.tensor(vector) >= 0)
    amounts = torch.full(rows.shape, amount)
    return Members(rows, torch.tensor(vector), amounts, there, torch.ones(len(rows), dtype=torch.bool))


def embedding() -> MemberEmbedding:
    torch.manual_seed(0)
    made = MemberEmbedding(SIZES, 8)
    labels = torch.tensor([[-1, -1], [0, -1], [1, -1], [0, 1]])
    made.describe(torch.randn(6, 2), labels, torch.where(labels >= 0, labels + 2, -1), 2.0)
    return made.eval()


def test_a_set_is_the_sum_of_its_members_and_an_empty_one_is_not_an_unknown_one() -> None:
    made, shown = embedding(), torch.zeros(4, dtype=torch.bool)
    codes = torch.tensor([1, 2, 3, 0])
    one, other, both, control = made(made.of_labels(codes), shown)[0]
    torch.testing.assert_close(both, one + other)
    assert torch.equal(control, torch.zeros(8))
    with torch.no_grad():
        made.unknown.fill_(7.0)
    unknown, acting = made(made.of_labels(torch.tensor([-1, 3])), torch.tensor([False, True]))
    assert torch.equal(unknown, torch.full((2, 8), 7.0))
    assert torch.equal(acting, torch.zeros(2, 8))


def test_the_order_of_members_does_not_matter_and_new_ones_are_known_by_their_vectors() -> None:
    made, shown = embedding(), torch.zeros(2, dtype=torch.bool)
    both = made(told([[0, 1], [1, 0]], [[2, 3], [3, 2]]), shown)[0]
    torch.testing.assert_close(both[0], both[1])
    new = made(told([[-1, -1]], [[5, -1]]), shown[:1])[0]
    assert made.known_by_name is not None
    torch.testing.assert_close(new[0], made.known_by_name(made.vectors[5]))


def test_an_amount_acts_through_a_hill_function_and_none_counts_as_much() -> None:
    made = embedding()
    with torch.no_grad():
        made.log_threshold[0], made.log_slope[0] = 0.5, 0.3
    for amount in (0.5, 2.0, 9.0):
        slope, threshold = torch.tensor(0.3).exp(), torch.tensor(0.5).exp()
        ratio = torch.tensor(amount / 2.0)
        expected = ratio**slope / (ratio**slope + threshold**slope)
        torch.testing.assert_close(made.strength(told([[0, -1]], [[-1, -1]], amount))[0, 0], expected)
    assert made.strength(told([[0, -1]], [[-1, -1]], 0.0))[0, 0] == 0
    assert made.strength(told([[0, -1]], [[-1, -1]]))[0].tolist() == [1, 0]


def test_training_forgets_own_rows_as_keys_say_and_never_what_has_no_vector() -> None:
    made, n = embedding(), 400
    keys = torch.arange(n)
    members = told([[0, -1]] * n, [[2, -1]] * n)
    hidden = torch.zeros(n, dtype=torch.bool)
    found = made(members, hidden, keys)[0]
    whole = made(members, hidden)[0]
    forgotten = ~torch.isclose(found, whole).all(1)
    assert 0.4 < forgotten.float().mean() < 0.6
    assert torch.equal(made(members, hidden, keys)[0], found)
    blind = told([[0, -1]] * n, [[-1, -1]] * n)
    torch.testing.assert_close(made(blind, hidden, keys)[0], made(blind, hidden)[0])


def flow() -> LatentFlow:
    torch.manual_seed(1)
    vae = VAE(VAEConfig(latent=3, hidden=8, blocks=1), 5, {})
    config = FlowConfig(source="neighbours", backbone={"width": 16, "layers": 1})
    made = LatentFlow(config, vae, {}, {}, {"guide": SIZES})
    labels = torch.tensor([[-1, -1], [0, -1], [1, -1], [0, 1]])
    of_names = torch.tensor([[-1, -1], [5, -1], [1, -1], [5, 1]])
    made.conditions.member_embeddings["guide"].describe(torch.randn(6, 2), labels, of_names, 2.0)
    with torch.no_grad():
        made.shift.weight.normal_()
    return made.eval()


def test_new_members_leave_the_old_as_they_are_and_begin_with_what_their_names_say() -> None:
    old = flow()
    sizes = SIZES.model_copy(update={"members": 5, "labels": 2, "largest": 3})
    grown = grow_members(old, "target", sizes)
    before, after = old.conditions.member_embeddings["guide"], grown.conditions.member_embeddings["target"]
    after.describe(before.vectors, torch.full((2, 3), -1), torch.full((2, 3), -1), 2.0)
    shown = torch.zeros(1, dtype=torch.bool)
    known = told([[0, 2]], [[5, 1]], 1.0)
    assert torch.equal(old.conditions({"guide": known}, shown), grown.conditions({"target": known}, shown))
    new = after(told([[4, -1]], [[3, -1]]), shown)[0]
    unseen = after(told([[-1, -1]], [[3, -1]]), shown)[0]
    assert torch.equal(new, unseen)
    assert torch.equal(grown.shift.weight, old.shift.weight)


def test_new_genes_stand_before_other_names() -> None:
    old = flow()
    vae = old.vae
    assert isinstance(vae, VAE)
    grown = grow_flow(old, grow_vae(vae, {}, torch.ones(2)), {})
    before, after = (one.conditions.member_embeddings["guide"] for one in (old, grown))
    assert len(after.vectors) == len(before.vectors) + 2
    assert torch.equal(after.vectors[[0, 1, 2, 3, 4, 7]], before.vectors)
    assert not after.vectors[5:7].any()
    shown, codes = torch.zeros(4, dtype=torch.bool), torch.arange(4)
    assert torch.equal(old.conditions({"guide": codes}, shown), grown.conditions({"guide": codes}, shown))


def test_what_acts_on_all_cells_alike_takes_its_learning_rate_from_the_width() -> None:
    vae = VAE(VAEConfig(latent=3, hidden=8, blocks=1), 5, {})
    config = FlowConfig(source="neighbours", backbone={"width": 16, "layers": 1, "transfer_from": 4})
    made = LatentFlow(config, vae, {}, {}, {"guide": SIZES})
    scales = made.learning_rate_scales()
    assert scales["shift.weight"] == 0.25
    assert scales.keys() <= dict(made.named_parameters()).keys()
