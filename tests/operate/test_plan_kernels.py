"""Kernels of a step, with their bytes and operations, as `bgen plan` follows them; counted, not measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bgen.config.load import load_config
from bgen.data.batch import CellBatch
from bgen.models.likelihoods.negative_binomial import NegativeBinomial
from bgen.operate.plan_kernels import Passes, follow
from bgen.operate.plan_subject import Subject
from bgen.track.devices import DEVICES

H200 = DEVICES["H200"]


class Net(nn.Module):
    """A block as networks repeat them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64, bias=False, device="meta")])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def followed(block: nn.Module, x: Tensor, *, compiled: bool) -> Passes:
    net = Net()
    net.blocks = nn.ModuleList([block])
    return follow(lambda: net(x).sum(), net, H200, "float32", compiled=compiled)


def test_a_product_reads_and_writes_matrices_once() -> None:
    x = torch.empty(1024, 64, device="meta")
    found = followed(nn.Linear(64, 64, bias=False, device="meta"), x, compiled=False)
    # x W, its sum, ones like the sum for its gradient, and the gradient of W
    moved = (2 * 1024 * 64 + 64 * 64) + (1024 * 64 + 1) + 2 + (1024 * 64 + 1 + 64 * 64)
    assert (found.launches, found.bytes) == (4, 4 * moved)
    assert found.products == pytest.approx(2 * 2 * 1024 * 64 * 64 / (0.8 * H200.float32))


def test_within_a_compiled_block_what_follows_is_one_kernel() -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x.exp() * 2).sin() + 1).tanh()

    def given() -> Tensor:
        return torch.empty(1024, 64, device="meta", requires_grad=True)

    plain, fused = (followed(Chain(), given(), compiled=compiled) for compiled in (False, True))
    assert plain.launches == 5 + 2 + 5  # cos is one more in the backward pass, and adding 1 none
    assert fused.launches == 1 + 2 + 1
    assert fused.bytes < plain.bytes / 2


def test_the_likelihood_moves_ten_bytes_a_cell_and_gene() -> None:
    """0.82 GB at 4,096 cells x 20,000 genes, where torch's operators move 19.5 GB."""
    B, G, each = 4096, 20_000, 1600
    logits = torch.empty(B, G, device="meta", dtype=torch.bfloat16, requires_grad=True)
    starts = torch.arange(0, B * each + 1, each)
    batch = CellBatch(starts, torch.empty(B * each).int(), torch.empty(B * each), G, keys=starts, cells=starts)
    there = batch.to(torch.device("meta"))
    likelihood = NegativeBinomial(logits, torch.empty(B, device="meta"), torch.empty(G, device="meta"))
    net = nn.Module()
    found = follow(lambda: likelihood.log_prob_sparse(there).sum(), net, H200, "bf16", compiled=False)
    counts = 2 * 2 * 8 * B * each  # an entry has 8 bytes, and is read twice in each pass
    assert found.bytes == pytest.approx(10 * B * G + counts, rel=0.001)
    assert found.bytes < 1.2e9


def test_compiling_leaves_fewer_kernels() -> None:
    config = load_config("vae", ["data.store=nowhere", "vae.hidden=64", "vae.blocks=3"])
    subject = Subject(config, 1000, 100)
    plain, fused = (subject.passes(64, H200, "bf16", compiled=compiled) for compiled in (False, True))
    assert plain is not None
    assert fused is not None
    assert fused.launches < plain.launches
    assert fused.bytes < plain.bytes
    assert fused.products == plain.products


def test_blocks_that_are_computed_again_are_followed() -> None:
    launches = {}
    for again in ("false", "true"):
        given = ["data.store=nowhere", "vae.hidden=64", "vae.blocks=3", f"vae.recompute={again}"]
        passes = Subject(load_config("vae", given), 1000, 100).passes(64, H200, "bf16", compiled=True)
        assert passes is not None
        launches[again] = passes.launches
    assert launches["true"] > launches["false"]
