"""`bgen plan` against the models themselves, and (slow) against the memory of real runs on two ranks."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bgen.config.load import load_config
from bgen.errors import UserError
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE
from bgen.nn.memory import activation_bytes
from bgen.operate import plan as module
from bgen.operate.plan import Plan, plan
from bgen.operate.plan_subject import Subject
from bgen.track import record
from bgen.track.devices import DEVICES, Device
from bgen.train.engine.memory import HOST, PROCESS_WITH_GPU, host_bytes, memory

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"genes": 1000, "tokens": 100}


def tiny(*overrides: str, **options: Any) -> Plan:
    given = ["data.store=nowhere", "vae.hidden=64", "train.global_batch=64", *overrides]
    return plan("vae", given, **(SIZES | options))


def test_parameters_are_those_of_the_model() -> None:
    config = load_config("vae", ["vae.hidden=64"])
    vae = VAE(config.vae, 1000, {})
    assert tiny().trained == sum(p.numel() for p in vae.parameters())
    assert sum(tiny().parameters.values()) == tiny().trained
    assert tiny().frozen == 0


def test_a_flow_trains_its_backbone_only() -> None:
    made = plan("flow", ["flow.vae=nowhere", "data.store=nowhere"], **SIZES)
    assert made.frozen == made.parameters["vae"]
    assert made.trained == made.parameters["backbone"] + made.parameters["conditions"]


def test_a_flow_without_a_vae_has_a_column_for_each_gene() -> None:
    made = plan("flow", ["flow.space=log_counts", "data.store=nowhere"], **SIZES)
    assert made.frozen == made.parameters["vae"] == 0
    more = plan("flow", ["flow.space=log_counts", "data.store=nowhere"], **SIZES | {"genes": 1100})
    assert more.trained - made.trained == 100 * (256 + 256 + 1)


def test_the_store_says_how_many_genes_and_tokens(demo: Any) -> None:
    made = plan("demo/vae", [f"data.store={demo.store}"])
    assert made.parameters["encoder"] > 100 * 64
    assert 1 < made.tokens_per_cell < 1000
    flow = plan("demo/flow", [f"data.store={demo.store}", f"flow.vae={demo.vae}"])
    assert flow.frozen > 0


def test_flops_of_the_flow_are_those_that_torch_counts() -> None:
    subject = Subject(load_config("flow", ["flow.vae=nowhere"]), 1000, 100)
    subject.materialise()
    flow, width, cells = subject.module, 256, 10
    assert isinstance(flow, LatentFlow)
    size = flow.size
    inputs = torch.randn(cells, 1, 1, size, requires_grad=True), torch.rand(cells, 1), torch.randn(cells, 1, width)
    inputs[2].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        flow.backbone(*inputs).sum().backward()
    others = flow.vae.latents_flops(1, 100) + 3 * flow.conditions.flops(1)
    assert counter.get_total_flops() / cells == pytest.approx(subject.flops() - others, rel=0.02)


def test_flops_of_the_vae() -> None:
    """Per cell: the sparse first layer twice, three times the other matrices."""
    genes, hidden, latent, tokens = 1000, 64, 24, 100
    block = 2 * hidden * hidden
    dense = hidden * 2 * latent + latent * hidden + 2 * block + hidden * genes
    assert tiny().flops_per_cell == 2 * (2 * tokens * hidden) + 3 * 2 * dense
    assert tiny().flops_per_step == 64 * tiny().flops_per_cell


def test_activations_are_counted_exactly_where_they_are_known() -> None:
    x = torch.zeros(1000, 256)
    w = torch.zeros(256, 256, requires_grad=True)

    def step() -> torch.Tensor:
        return ((x @ w).exp() * 2.0).sum()

    # x w, its exponential and the product live together at the peak; the first is freed only then.
    assert activation_bytes(step, [x, w]) == pytest.approx(4 * x.nbytes, rel=0.26)
    assert activation_bytes(step, [x, w]) >= 3 * x.nbytes


def test_activations_grow_with_the_micro_batch() -> None:
    small, large = tiny("train.micro_batch=16"), tiny("train.micro_batch=64")
    assert 2 < large.activations / small.activations <= 4.5


def test_memory_by_stage_and_offload() -> None:
    made = tiny(ranks_per_node=4)
    by = {(m.zero, m.offload): m for m in made.memory}
    assert list(by) == [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]
    P = 4 * made.trained
    assert (by[0, False].weights, by[0, False].optimizer) == (P, 2 * P + 2 * P)  # the last for the average and the best
    assert by[1, False].optimizer == 3 * (P // 4) + 2 * (P // 4)
    assert by[1, True].device < by[1, False].device < by[0, False].device
    assert by[1, True].host > by[1, False].host
    assert made.chosen == by[1, False]


def test_more_ranks_take_less_each() -> None:
    train = load_config("vae").train
    shape: dict[str, Any] = {"trained": 10_000_000, "frozen": 0, "largest": 10**6, "activations": 0, "offload": False}
    for zero in (1, 2, 3):
        sizes = [memory(train, ranks=ranks, zero=zero, **shape).device for ranks in (1, 2, 8)]
        assert sizes[0] > sizes[1] > sizes[2]


def test_recommended_micro_batch_divides_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = tiny("train.global_batch=96", ranks_per_node=2, gpu="H100")
    assert roomy.recommended_micro_batch == 48
    need = tiny("train.global_batch=96", "train.micro_batch=12", ranks_per_node=2, gpu="H100").chosen.device
    monkeypatch.setitem(DEVICES, "small", Device(1e12, 1e12, 1.02 * need / module.FILL))
    fitted = tiny("train.global_batch=96", ranks_per_node=2, gpu="small").recommended_micro_batch
    assert fitted in (12, 16)
    monkeypatch.setitem(DEVICES, "none", Device(1e12, 1e12, 1e3))
    assert tiny(gpu="none").recommended_micro_batch is None


def test_what_ranks_tell_each_other_takes_its_time() -> None:
    """By hand, on two hosts of 4: what leaves a host goes over 4 cards of 400 Gb/s, of which .8 is reached."""
    given: dict[str, Any] = {"gpu": "H100", "ranks_per_node": 4, "nodes": 2}
    alone, one, three = tiny(gpu="H100"), tiny(**given), tiny("train.zero=3", "train.micro_batch=4", **given)
    P = 4 * one.trained
    assert alone.step is not None
    assert one.step is not None
    assert three.step is not None
    assert (alone.step.reduce, alone.step.gather) == (0, 0)
    once = P * (7 / 8) / (0.8 * 4 * 50e9)
    assert one.step.reduce == pytest.approx(2 * once)
    assert one.step.gather == pytest.approx(once)
    assert (three.step.gather, three.step.reduce) == pytest.approx((2 * once, 2 * once))  # two micro batches
    two = tiny("train.zero=2", "train.micro_batch=4", **given).step
    assert two is not None
    assert (two.gather, two.reduce) == pytest.approx((once, 2 * 2 * once))
    within = tiny(gpu="H100", ranks_per_node=4).step
    assert within is not None
    assert within.reduce == pytest.approx(2 * P * (3 / 4) / (0.8 * 450e9))
    assert tiny(**given, network=100).step.reduce == pytest.approx(4 * one.step.reduce)  # type: ignore[union-attr]
    stage0 = tiny("train.zero=0", **given).step
    assert stage0 is not None
    assert (stage0.reduce, stage0.gather) == (one.step.reduce, 0)
    half = tiny("train.zero=0", "train.precision=pure_bf16", **given).step
    assert half is not None
    assert half.reduce == pytest.approx(one.step.reduce / 2)
    bf16 = tiny("train.reduce_precision=bf16", **given).step
    assert bf16 is not None
    assert (bf16.reduce, bf16.gather) == (one.step.reduce / 2, one.step.gather)
    assert one.cells_per_day == pytest.approx(86400 * 64 / one.step.seconds)


def test_scaling_and_advice() -> None:
    made = tiny(gpu="H100", ranks_per_node=8)
    assert [n for n, _, _ in made.scaling] == [1, 2, 4, 8, 16, 32, 64]
    shares = [share for _, _, share in made.scaling]
    assert shares[0] == 1
    assert all(a >= b for a, b in pairwise(shares))
    assert made.balanced is not None
    assert "Kernels are too small for the GPU." in made.advice[0]
    assert f"From {made.balanced:,} cells a rank on (train.global_batch={8 * made.balanced})" in made.advice[0]
    slow = tiny(gpu="L4", ranks_per_node=8, nodes=2, network=0.1)
    assert "The ranks talk" in slow.advice[0]
    assert f"From {slow.balanced:,} cells a rank on (train.global_batch={16 * (slow.balanced or 0)})" in slow.advice[0]
    there = tiny("vae.hidden=1024", "train.global_batch=16384", gpu="H100", ranks_per_node=8)
    assert there.balanced is not None
    assert there.balanced < 2048
    assert not any("computing takes longest" in said for said in there.advice)
    many = tiny("train.zero=3", "train.micro_batch=4", gpu="H100", ranks_per_node=2, nodes=2, network=0.1)
    assert "train.zero=0 fits as well, and a step is " in many.advice[-1]
    assert many.read == pytest.approx(0.85 * 100 * many.cells_per_day / 86400 / 2)
    console = Console(width=160, file=io.StringIO())
    console.print(many.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "gradients" in text
    assert "64 hosts" in text
    assert "fits as well" in text
    assert tiny().step is None
    assert tiny().advice == []


def test_small_kernels_wait_for_their_launch() -> None:
    """Twice as many cells take no longer, until computing takes longer than launching."""
    few, more = tiny(gpu="H100").step, tiny("train.global_batch=128", gpu="H100").step
    assert few is not None
    assert more is not None
    assert few.seconds == more.seconds > 64 * tiny().flops_per_cell / (0.2 * 67e12)
    made = tiny(gpu="H100")
    assert made.passes is not None
    assert few.compute == pytest.approx(7e-6 * made.passes.launches)
    assert made.balanced is not None
    assert made.balanced > 512
    assert made.mfu == pytest.approx(64 * made.flops_per_cell / (few.compute * 67e12))


def test_speed() -> None:
    large = ["vae.hidden=4096", "train.global_batch=8192"]  # computing, not launching, takes the time
    fast, slow = tiny(*large, gpu="H100", mfu=0.4), tiny(*large, gpu="H100", mfu=0.2)
    assert fast.cells_per_day == pytest.approx(2 * slow.cells_per_day)
    # float32 at half a peak of 67 TFLOP/s
    assert tiny(*large, gpu="H100", mfu=0.5).cells_per_day == pytest.approx(86400 * 33.5e12 / fast.flops_per_cell)
    assert tiny(*large, "train.precision=bf16", gpu="H100", mfu=0.5).cells_per_day > 4 * fast.cells_per_day
    steps = load_config("vae").train.steps
    assert fast.hours == pytest.approx(24 * steps * 8192 / fast.cells_per_day)
    assert fast.as_json()["tokens_per_day"] == pytest.approx(100 * fast.cells_per_day)
    assert "this machine" in tiny().speed


def test_checkpoint_size_is_that_of_a_run(demo: Any) -> None:
    given = ["train.global_batch=128", "train.eval_every=30", f"data.store={demo.store}"]
    made = plan("demo/vae", given)
    (newest, *_) = sorted((demo.vae / "checkpoints").glob("step_*"), reverse=True)
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    assert made.checkpoint == pytest.approx(size, rel=0.15)
    assert made.checkpoints == 2 * made.checkpoint


def test_the_table_marks_what_was_chosen() -> None:
    console = Console(width=160, file=io.StringIO())
    made = tiny(gpu="A100", ranks_per_node=8, nodes=2)
    console.print(made.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "16 ranks x 1 x 4 cells" in text
    assert "16 x A100 at 0% of the peak" in text  # four cells a rank
    assert f"{made.passes.launches} a micro batch" in text  # type: ignore[union-attr]
    assert "train.micro_batch=4" in text


@pytest.mark.parametrize(
    ("overrides", "options", "said"),
    [
        ([], {"gpu": "H10"}, "Did you mean 'H100'"),
        ([], {"mfu": 2.0}, "above 0 and at most 1"),
        ([], {"ranks_per_node": 7}, "does not divide among 7 ranks"),
        ([], {"genes": None}, "Or plan without it: --genes and --expressed"),
        (["train.zeroo=1"], {}, "Did you mean 'zero'"),
    ],
)
def test_mistakes(overrides: list[str], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        tiny(*overrides, **options)


class Made(TorchDispatchMode):
    """Adds up the bytes of all tensors on the CPU that operators make."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and not func.is_view:
                self.bytes += tensor.nbytes
        return out


@pytest.mark.parametrize(
    ("config", "given", "parameters"),
    [
        ("vae", ["vae.blocks=1"], 2e8),
        pytest.param("trajectories", ["flow.vae=nowhere"], 5e9, marks=pytest.mark.slow),
    ],
)
def test_the_largest_size_takes_no_memory(config: str, given: list[str], parameters: float, tmp_path: Path) -> None:
    (tmp_path / "xl.yaml").write_text(f"extends: [{config}, sizes/xl]\n")
    sizes = {"genes": 20_000, "tokens": 500, "gpu": "H200", "ranks_per_node": 8}
    with Made() as made:
        planned = plan(str(tmp_path / "xl.yaml"), ["data.store=nowhere", *given], **sizes)
    assert planned.trained + planned.frozen > parameters
    assert planned.activations > 32 * 20_000
    assert planned.host > 8 * 4 * (planned.trained + 2 * planned.frozen)
    assert made.bytes < parameters / 2, "the weights would be eight times as much, at least"
    with Made() as made:
        Subject(load_config("vae", ["vae.hidden=16"]), 1000, 100).materialise()
    assert made.bytes > 4 * 1000 * 16, "what is made is counted"


@pytest.mark.parametrize(
    ("given", "least"), [(["flow.vae=nowhere"], 0.97), (["flow.space=log_counts"], 0.999), ([], 0.6)]
)
def test_without_memory_the_figures_are_the_same(given: list[str], least: float) -> None:
    """Activations of a VAE are less, as on GPUs: kernels keep neither dense counts nor what makes a likelihood."""
    subject = Subject(load_config("flow" if given else "vae", given), 1000, 100)
    assert all(p.is_meta for p in subject.module.parameters())
    found = subject.sizes, subject.flops(4), subject.activations()(32)
    subject.materialise()
    assert (subject.sizes, subject.flops(4)) == found[:2]
    told = subject.activations()(32)
    print(f"activations {found[2]} without memory, {told} with")
    assert least < found[2] / told < 1.04


def test_a_pass_that_asks_for_values_is_run_for_real() -> None:
    subject = Subject(load_config("vae", ["vae.hidden=16"]), 1000, 100)

    def look() -> float:
        return next(subject.module.parameters()).sum().item()

    assert subject.device.type == "meta"
    assert isinstance(subject._followed(look), float)
    assert subject.device.type == "cpu"


def test_a_model_too_large_to_time_goes_by_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = tiny()
    monkeypatch.setattr(module, "TIMED", timed.trained - 1)
    told = tiny()
    assert "by a pass on this machine" in timed.speed
    assert "by a matrix product on this machine" in told.speed
    assert (told.trained, told.flops_per_step, told.checkpoint) == (
        timed.trained,
        timed.flops_per_step,
        timed.checkpoint,
    )
    assert 0 < told.hours < float("inf")


def test_memory_of_a_host_is_that_of_its_ranks() -> None:
    """A rank on a GPU builds all on the host, and reads the frozen part beside it; then only copies are there."""
    train = load_config("vae").train
    shape: dict[str, Any] = {"trained": 10**9, "frozen": 10**8, "largest": 10**6, "activations": 0, "ranks": 8}
    needed = memory(train, zero=1, offload=False, **shape)
    assert host_bytes(needed, 10**8, 10**9, 8, gpu=True) == HOST + 8 * (PROCESS_WITH_GPU + 4 * (10**9 + 2 * 10**8))
    offloaded = memory(train, zero=1, offload=True, **(shape | {"ranks": 1}))
    assert offloaded.host > 4 * (10**9 + 2 * 10**8)
    assert host_bytes(offloaded, 10**8, 10**9, 1, gpu=True) == HOST + PROCESS_WITH_GPU + offloaded.host
    assert host_bytes(needed, 10**8, 10**9, 8, gpu=False) == HOST + 8 * needed.resident


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 cells of 12,000 genes, so that the model's memory is large beside the process's."""
    folder = tmp_path_factory.mktemp("wide")
    generator = np.random.default_rng(0)
    counts = sp.random(1000, 12_000, density=0.1, format="csr", rng=generator, dtype=np.float32)
    counts.data = generator.integers(1, 9, counts.nnz).astype(np.float32)
    obs = pd.DataFrame({"cell_type": pd.Categorical(generator.choice(["T", "B"], 1000))})
    obs.index = [f"cell{number}" for number in range(1000)]
    var = pd.DataFrame(index=[f"ENSG{number:011d}" for number in range(12_000)])
    anndata.AnnData(counts, obs=obs, var=var).write_h5ad(folder / "wide.h5ad")
    build = ["-m", "bgen", "data", "build", str(folder / "wide.h5ad"), "--out", str(folder / "store")]
    subprocess.run([sys.executable, *build], check=True, cwd=ROOT, capture_output=True)
    return folder / "store"


CONFIGS = {
    "wide": ["vae.hidden=1024", "vae.blocks=1", "train.global_batch=128"],
    "deep": ["vae.hidden=512", "vae.blocks=8", "train.global_batch=512", "train.micro_batch=64", "train.ema=0.99"],
    "batch": ["vae.hidden=256", "vae.blocks=1", "train.global_batch=2048"],
}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_that_of_a_real_run(name: str, zero: int, wide_store: Path, tmp_path: Path) -> None:
    """Within 15 % of the peak of rank 0 of two, checkpoints included."""
    train = [f"train.zero={zero}", "train.steps=6", "train.eval_every=0", "train.patience=0", "train.log_every=1"]
    train += ["train.checkpoint_every=3", "track.mlflow=false", "track.progress=false", f"data.store={wide_store}"]
    given = [*CONFIGS[name], *train, f"out={tmp_path / 'run'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "bgen", "train", "vae", *given]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [row for row in record.read(tmp_path / "run" / "record.jsonl") if row["kind"] == "train"]
    measured = 1e9 * max(row["memory_gb"] for row in rows)
    planned = plan("vae", given, ranks_per_node=2).chosen.resident
    print(f"{name} zero {zero}: planned {planned / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert planned == pytest.approx(measured, rel=0.15)
