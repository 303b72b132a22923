"""Low-rank changes: nothing at the start, few parameters, and an ordinary module after merging."""

from __future__ import annotations

import torch
from torch import nn

from bgen.nn.lora import add_lora, merge_lora


def test_a_change_starts_at_nothing_and_merges_into_the_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, 3))
    names, x = set(network.state_dict()), torch.randn(5, 40)
    before = network(x)
    assert add_lora(network, 4) == ["0"]  # 3 outputs are too few for rank 4
    torch.testing.assert_close(network(x), before)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 2 * 4 * 40
    optimizer = torch.optim.SGD(trained, 1.0)
    for _ in range(3):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
    changed = network(x)
    assert not torch.allclose(changed, before)
    merge_lora(network)
    torch.testing.assert_close(network(x), changed)
    assert set(network.state_dict()) == names


def test_the_change_is_alpha_over_rank_times_the_product() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 40)
    before = layer.weight.detach().clone()
    add_lora(nn.Sequential(layer), 4, alpha=8.0)
    change = layer.parametrizations.weight[0]
    nn.init.normal_(change.b)
    torch.testing.assert_close(layer.weight, before + 2.0 * change.b @ change.a)
