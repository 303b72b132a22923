"""mamba-ssm's Triton kernels against our SSD: values, gradients, groups, packing, initial and final states.

Small float32 shapes: the interpreter is slow, and its bfloat16 is wrong (compare that on a GPU).
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bgen.config.backbone import Mamba1Config, Mamba2Config, TimeConfig
from bgen.errors import UserError
from bgen.nn.mixers.mamba1 import Mamba1
from bgen.nn.mixers.mamba2 import Mamba2
from bgen.nn.points import Points
from bgen.nn.scans import published_kernels as kernels
from bgen.nn.scans.ssd import ssd_sequential

NEEDED = ("triton", "mamba_ssm", "einops")
pytestmark = pytest.mark.filterwarnings("ignore:Deterministic mode")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(T: int, K: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(T)
    shapes = {"x": (2, T, 2, 16), "dt": (2, T, 2), "a": (2,), "b": (2, T, K, 16), "c": (2, T, K, 16)}
    made = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    made["dt"] = made["dt"].abs() * 0.5 + 0.01
    made["a"] = -made["a"].abs() - 0.5
    return [*made.values(), torch.randn(2, 2, 16, 16, generator=g)]


def errors(T: int, K: int, *, packed: bool = False, impulse: bool = False, wrong: float = 1.0) -> dict[str, float]:
    """Largest errors, relative to the largest value, of the kernels in float32 against the loop in float64."""
    made = inputs(T, K)
    sequence = None
    if packed:
        sequence = (torch.arange(T) * 3 // T).expand(2, T)
    exact = [t.double().requires_grad_() for t in made]
    x, dt, a, b, c, initial = exact
    gained = x if impulse else x * dt[..., None]
    expected = ssd_sequential(gained, dt * a * wrong, b, c, initial, sequence)
    single = [t.to(DEVICE).requires_grad_() for t in made]
    on_device = None if sequence is None else sequence.to(DEVICE)
    found = kernels.ssd_fused(*single[:5], initial_BHPS=single[5], sequence_BT=on_device, impulse=impulse)
    names, pairs = ["y", "state"], list(zip(found, expected, strict=True))
    for y, state in (found, expected):
        weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        loss = (y * weight).sum() + (0.0 if packed else state.square().sum())
        loss.backward()
    names += ["dx", "ddt", "da", "db", "dc", "dinitial"]
    pairs += [(mine.grad, reference.grad) for mine, reference in zip(single, exact, strict=True)]  # type: ignore[misc]
    return {
        name: float((mine.detach().cpu() - reference.detach()).abs().max() / reference.detach().abs().max())
        for name, (mine, reference) in zip(names, pairs, strict=True)
    }


@pytest.mark.parametrize("T", [1, 5, 21, 70])
def test_kernels_equal_loop(T: int) -> None:
    found = errors(T, 1)
    assert max(found.values()) < 3e-6, found


@pytest.mark.parametrize(("packed", "impulse", "K"), [(True, False, 1), (False, True, 1), (False, False, 2)])
def test_packing_impulse_and_groups(packed: bool, impulse: bool, K: int) -> None:
    found = errors(21, K, packed=packed, impulse=impulse)
    found.pop("state" if packed else "", None)
    assert max(found.values()) < 1e-5, found


def test_a_decay_wrong_by_one_percent_is_seen() -> None:
    found = errors(21, 1, wrong=1.01)
    assert found["y"] > 1e-4
    assert found["da"] > 1e-4


@pytest.mark.parametrize("real_time", [True, False])
def test_block_is_the_same_on_both_backends(real_time: bool) -> None:
    torch.manual_seed(0)
    time = TimeConfig(real_time=real_time)
    config = Mamba2Config(head_width=16, state=16, backend="torch")
    plain = Mamba2(16, config, time).to(DEVICE)
    fused = Mamba2(16, config.model_copy(update={"backend": "fused"}), time).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    u = torch.randn(2, 9, 16, device=DEVICE)
    valid = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    valid[1, 6:] = False
    valid[0, 2] = False
    points = Points(valid, (torch.rand(2, 9, device=DEVICE) * 3).round(decimals=1).cumsum(1))
    results = []
    for block in (plain, fused):
        y = block(u, points)[valid]
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters())])
    for mine, reference in zip(results[1], results[0], strict=True):
        assert mine is not None
        assert reference is not None
        assert (mine - reference).abs().max() < 1e-4 * reference.abs().max()


def test_our_block_is_the_published_one() -> None:
    """Same weights, same output and gradients, on a regular grid in one direction."""
    published = kernels.import_published("modules.mamba2_simple").Mamba2Simple
    torch.manual_seed(0)
    theirs = published(16, d_state=16, headdim=16, ngroups=1, chunk_size=16, use_mem_eff_path=False).to(DEVICE)
    config = Mamba2Config(head_width=16, state=16, backend="torch")
    ours = Mamba2(16, config, TimeConfig(direction="causal", real_time=False)).to(DEVICE)
    assert ours.convolution is not None
    with torch.no_grad():
        ours.in_proj.weight.copy_(theirs.in_proj.weight)
        ours.convolution.weight.copy_(theirs.conv1d.weight[:, 0].flip(1).T)
        ours.convolution.bias.copy_(theirs.conv1d.bias)
        ours.dt_bias.copy_(theirs.dt_bias[None])
        ours.A_log.copy_(theirs.A_log)
        ours.D.copy_(theirs.D)
        ours.norm.weight.copy_(theirs.norm.weight)
        ours.out_proj.weight.copy_(theirs.out_proj.weight)
    u = torch.randn(2, 21, 16, device=DEVICE)
    y, reference = ours(u, Points()), theirs(u)
    assert (y - reference).abs().max() < 1e-5 * reference.abs().max()
    y.square().sum().backward()
    reference.square().sum().backward()
    for mine, their in (
        (ours.in_proj.weight.grad, theirs.in_proj.weight.grad),
        (ours.dt_bias.grad, theirs.dt_bias.grad[None]),
        (ours.A_log.grad, theirs.A_log.grad),
        (ours.D.grad, theirs.D.grad),
        (ours.norm.weight.grad, theirs.norm.weight.grad),
        (ours.out_proj.weight.grad, theirs.out_proj.weight.grad),
    ):
        assert (mine - their).abs().max() < 1e-4 * their.abs().max()


@pytest.mark.parametrize("real_time", [True, False])
def test_mamba1_hands_its_tensors_to_the_published_scan(real_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the package's own plain version of the scan stands in for its compiled kernel."""
    if DEVICE.type == "cpu":
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
        scan = kernels.import_published("ops.selective_scan_interface")
        monkeypatch.setattr(scan, "selective_scan_fn", scan.selective_scan_ref)
        kernels.missing.cache_clear()
    elif (reason := kernels.missing("mamba1")) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    time = TimeConfig(real_time=real_time)
    plain = Mamba1(16, Mamba1Config(state=4, backend="torch"), time).to(DEVICE)
    fused = Mamba1(16, Mamba1Config(state=4, backend="fused"), time).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    u = torch.randn(2, 9, 16, device=DEVICE)
    valid = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    valid[1, 6:] = False
    points = Points(valid, (torch.rand(2, 9, device=DEVICE) * 3).round(decimals=1).cumsum(1))
    y, reference = fused(u, points)[valid], plain(u, points)[valid]
    assert (y - reference).abs().max() < 1e-5 * reference.abs().max()
    with pytest.raises(UserError, match="packed"):
        fused(u, Points(sequence_BL=valid.long()))
