from __future__ import annotations

import torch

from bgen.nn.residual import ResidualBlock, keyed_dropout


def test_dropout_keeps_the_expectation_and_depends_on_key_and_layer() -> None:
    keys = torch.arange(2000)
    x = torch.ones(2000, 16)
    dropped = keyed_dropout(x, keys, 3, 0.25)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(dropped.mean() - 1) < 0.02
    assert torch.equal(keyed_dropout(x[5:9], keys[5:9], 3, 0.25), dropped[5:9])
    assert not torch.equal(keyed_dropout(x, keys, 4, 0.25), dropped)


def test_block_drops_in_training_only() -> None:
    block = ResidualBlock(8, 0.5, 0)
    x = torch.randn(4, 8)
    assert not torch.allclose(block(x, torch.arange(4)), block(x, torch.arange(4) + 4))
    block.eval()
    assert torch.equal(block(x, None), block(x, torch.arange(4)))


def test_recomputed_is_the_same_with_less_kept() -> None:
    torch.manual_seed(0)
    kept = ResidualBlock(8, 0.5, 0)
    again = ResidualBlock(8, 0.5, 0, recompute=True)
    again.load_state_dict(kept.state_dict())
    saved: dict[bool, int] = {}
    for block in (kept, again):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, packed=packed: packed.append(t) or t, lambda t: t):
            y = block(x, torch.arange(4))
        y.square().sum().backward()
        saved[block.recompute] = len(packed)
    assert saved[True] < saved[False]
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(kept.parameters(), again.parameters(), strict=True))
