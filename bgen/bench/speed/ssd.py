"""``bgen bench ssd``: the chunked state-space scan beside the plain loop, and our Mamba-2 block beside Transformers'.

Forward and backward on one thread of the CPU, with freed memory kept as in training; ratios of medians, the repetitions
interleaved.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bgen.config.backbone import Mamba2Config, TimeConfig
from bgen.nn.mixers.mamba2 import Mamba2
from bgen.nn.points import Points
from bgen.nn.scans.ssd import ssd_chunked, ssd_sequential
from bgen.progress import Say
from bgen.train.heap import keep_heap

SHAPES = ((64, 32), (512, 4), (2048, 1))
"""(length, sequences): 2,048 points in all."""

HEADS, CHANNELS, STATE = 8, 64, 64

BLOCK = {"sequences": 4, "length": 512, "width": 256}


def bench_ssd(repetitions: int = 5, say: Say = lambda line: None) -> dict[str, Any]:
    """Measure, in milliseconds of wall time.

    Returns
    -------
    dict
        ``scan``: per length the medians of chunked and loop and how many times faster chunked is; ``block``: our
        Mamba-2 block, and that of the transformers library where it is installed.
    """
    keep_heap()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scans = []
        for length, sequences in SHAPES:
            say(f"scan of {sequences} x {length} points")
            inputs = _inputs(sequences, length)
            gradient = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
            chunked, loop = (functools.partial(_scan, scan, inputs, gradient) for scan in (ssd_chunked, ssd_sequential))
            # the loop takes seconds: fewer of it, each after as many of the other
            times = _interleave({"chunked": chunked, "loop": loop}, {"chunked": 4 * repetitions, "loop": repetitions})
            scans.append({"length": length, "sequences": sequences, **times, "ratio": times["loop"] / times["chunked"]})
        say("Mamba-2 blocks")
        blocks = _blocks()
        block = _interleave(blocks, dict.fromkeys(blocks, 3 * repetitions))
        return {"torch": torch.__version__, "scan": scans, "block": {**BLOCK, **block}}
    finally:
        torch.set_num_threads(threads)


def _inputs(sequences: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(sequences, length, *shape, generator=generator)

    found = [draw(HEADS, CHANNELS), -0.1 * draw(HEADS).abs(), draw(1, STATE), draw(1, STATE)]
    return [tensor.requires_grad_() for tensor in found]


def _scan(scan: Callable[..., tuple[Tensor, Tensor | None]], inputs: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(scan(*inputs)[0], inputs, gradient)


def _blocks() -> dict[str, Callable[[], None]]:
    u = torch.randn(BLOCK["sequences"], BLOCK["length"], BLOCK["width"], generator=torch.Generator().manual_seed(0))
    ours = Mamba2(BLOCK["width"], Mamba2Config(state=STATE), TimeConfig(direction="causal", real_time=False))
    found: dict[str, Callable[[], None]] = {"bgen": functools.partial(_run_block, lambda x: ours(x, Points()), u)}
    if importlib.util.find_spec("transformers") is not None:
        theirs = _transformers_block()
        found["transformers"] = functools.partial(_run_block, lambda x: theirs(x), u)
    return found


def _run_block(block: Callable[[Tensor], Any], u: Tensor) -> None:
    x = u.clone().requires_grad_()
    y = block(x)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()


def _transformers_block() -> nn.Module:
    import transformers
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    transformers.logging.set_verbosity_error()
    config = transformers.Mamba2Config(
        hidden_size=BLOCK["width"], num_heads=HEADS, head_dim=CHANNELS, expand=2, state_size=STATE, n_groups=1
    )
    mixer: nn.Module = Mamba2Mixer(config, layer_idx=0)
    return mixer


def _interleave(what: dict[str, Callable[[], None]], repetitions: dict[str, int]) -> dict[str, float]:
    """Return the median milliseconds of each, after one run to warm up."""
    times: dict[str, list[float]] = {name: [] for name in what}
    for run in what.values():
        run()
    for repetition in range(max(repetitions.values())):
        for name, run in what.items():
            if repetition < repetitions[name]:
                began = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}
