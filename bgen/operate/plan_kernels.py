"""The kernels of a step on a GPU, with their bytes and operations, from passes over tensors without memory (meta).

Every operator that computes something is a kernel. With ``train.compile``, in what is compiled (see
:mod:`bgen.train.engine.compiled`) operators that follow one another and compute place by place, or over rows, become
one kernel, which reads what came from before it and writes what is read after it; matrix products, attention and bgen's
own kernels stay apart. A sum over cells, such as a bias's gradient, ends a kernel and takes one more. A weight's
conversion is a kernel of its own.

A kernel takes the longest of three: its bytes at the bandwidth of the memory, its operations at the rate of tensor
cores, and :data:`LEAST`. Those that read and write very little are therefore not free. Nothing of it was held against a
GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from bgen.nn.scans.ssd import ssd_flops
from bgen.track.devices import Device
from bgen.train.engine.compiled import blocks_of, methods_of

LEAST = 3e-6
"""Seconds of the smallest kernel on the GPU itself."""

REACHED_PRODUCT = 0.8
"""Share of the peak that large matrix products reach."""

REACHED_MEMORY = 0.9
"""Share of the memory's bandwidth that kernels reach."""

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
ROWS = ("sum", "mean", "var_mean", "native_layer_norm_backward")
"""Operators that may sum over cells."""

OWN = {
    "_scaled_dot_product_efficient_attention_backward": 3,
    "published_ssd": 5,
    "published_ssd_gradient": 24,
    "log_prob_gradients": 2,
    "native_layer_norm_backward": 2,
}
"""Kernels of operators that are more than one."""

READS = {"log_prob": 2, "log_prob_gradients": 2}
"""How often operators read what they are given, where it is not once: softmax needs all genes before the first."""


@dataclass
class Kernel:
    """One or more kernels that are launched for the same.

    Attributes
    ----------
    read, written
        Bytes.
    flops
        Of matrix products.
    launches
        How many it is.
    fusible
        Whether more can be added.
    """

    block: int | None = None
    read: int = 0
    written: int = 0
    flops: int = 0
    launches: int = 1
    fusible: bool = False

    def seconds(self, device: Device, peak: float) -> float:
        """How long a GPU takes for it."""
        moved = (self.read + self.written) / (REACHED_MEMORY * device.bandwidth)
        return max(moved, self.flops / (REACHED_PRODUCT * peak), LEAST * self.launches)


@dataclass(frozen=True)
class Passes:
    """Both passes of a micro batch.

    Attributes
    ----------
    launches
        Kernels that are started.
    bytes
        Read and written.
    products, seconds
        Seconds of the matrix products at the peak that they reach, and of all kernels.
    """

    launches: int
    bytes: int
    products: float
    seconds: float


def follow(step: Callable[[], Tensor], module: nn.Module, device: Device, precision: str, *, compiled: bool) -> Passes:
    """Return what a GPU would do in both passes of ``step``, which are made of tensors without memory.

    Parameters
    ----------
    step
        Returns the loss.
    module
        What is trained; its blocks may be compiled.
    device
        The GPU.
    precision
        As ``train.precision``: but for float32, matrix products are of bfloat16.
    compiled
        As ``train.compile``.
    """
    kernels = _Kernels(module.parameters())
    with ExitStack() as stack:
        stack.enter_context(kernels.watched(module) if compiled else nullcontext())
        if precision != "float32":
            stack.enter_context(_Autocast())
        stack.enter_context(kernels)
        _backward(step())
    module.zero_grad(set_to_none=True)
    peak, found = device.peak(precision), kernels.found
    return Passes(
        launches=sum(kernel.launches for kernel in found),
        bytes=sum(kernel.read + kernel.written for kernel in found),
        products=sum(kernel.flops for kernel in found) / (REACHED_PRODUCT * peak),
        seconds=sum(kernel.seconds(device, peak) for kernel in found),
    )


def _backward(loss: Tensor) -> None:
    """``loss.backward()``, which as a function of torch would leave the mode above, also for blocks computed again."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Autocast(TorchFunctionMode):
    """What autocast does to matrix products, of tensors that have none: they are of bfloat16."""

    NARROW = frozenset(
        {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm, torch.addmm, torch.einsum}
        | {F.scaled_dot_product_attention, torch.baddbmm, F.conv1d}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.NARROW:
            args, kwargs = tree_map_only(Tensor, _narrow, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention by the kernel that a GPU takes where there is a mask, which it wants as numbers, one for each pair."""
    bias = None
    if attn_mask is not None:
        bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~attn_mask, float("-inf"))
        bias = bias.expand(*q.shape[:3], k.shape[2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, is_causal=is_causal)[0]
    return out


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


def starts_a_kernel(func: Any) -> bool:
    """Whether an operator computes something."""
    name = func._schema.name.partition("::")[2]
    return not (func.is_view or "empty" in name or name in ("detach", "alias", "_local_scalar_dense"))


class _Kernels(TorchDispatchMode):
    """Collects kernels as operators come.

    Attributes
    ----------
    found
        Kernels so far.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.found: list[Kernel] = []
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._makers: dict[int, Kernel] = {}  # of a storage: the kernel that made it, if it was not written yet
        self._block: int | None = None
        self._ranges: list[tuple[int, int, int]] = []

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Within this, operators of what can be compiled are known as such."""
        places = [(block, "forward") for block in blocks_of(model)] + methods_of(model)
        for place, (module, name) in enumerate(places):
            setattr(module, name, self._marked(getattr(module, name), place))
        try:
            yield
        finally:
            for module, name in places:
                delattr(module, name)  # the class has it as it is written

    def _marked(self, method: Callable[..., Any], place: int) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            if self._block is not None:
                return method(*args, **kwargs)
            self._block, begin = place, torch.autograd._get_sequence_nr()
            try:
                return method(*args, **kwargs)
            finally:
                self._ranges.append((begin, torch.autograd._get_sequence_nr(), place))
                self._block = None

        return marked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if starts_a_kernel(func):
            self._add(func, args, kwargs or {}, out)
        return out

    def _add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.partition("::")[2].rstrip("_")
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        block = self._of()
        apart = name in PRODUCTS or "attention" in name or not func._schema.name.startswith("aten::")
        weight = name == "to_copy" and any(t.untyped_storage()._cdata in self._weights for t in read)
        kernel = self.found[-1] if self.found else Kernel()
        if apart or weight or block is None or not kernel.fusible or kernel.block != block:
            kernel = Kernel(block, fusible=block is not None and not apart and not weight, launches=OWN.get(name, 1))
            if weight and self.found and self.found[-1].fusible:
                self.found.insert(len(self.found) - 1, kernel)  # before what is being fused, which goes on
            else:
                self.found.append(kernel)
        kernel.flops += _flops(func, name, args, kwargs, out)
        self._read(kernel, name, read)
        self._write(kernel, made)
        if kernel.fusible and name in ROWS and _over_cells(name, args, read, made):
            kernel.launches += 1
            kernel.fusible = False

    def _of(self) -> int | None:
        """The block that is being computed, in the backward pass that of the node of the graph."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._block
        number = node._sequence_nr()
        return next((block for begin, end, block in self._ranges if begin <= number < end), None)

    def _read(self, kernel: Kernel, name: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            maker = self._makers.get(tensor.untyped_storage()._cdata)
            if maker is kernel:
                continue  # it is in registers
            kernel.read += _size(tensor) * READS.get(name, 1)
            if maker is not None:
                maker.written += tensor.untyped_storage().nbytes()
                del self._makers[tensor.untyped_storage()._cdata]

    def _write(self, kernel: Kernel, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not kernel.fusible:
                kernel.written += _size(tensor)
            elif storage._cdata not in self._makers:
                self._makers[storage._cdata] = kernel
                weakref.finalize(storage, self._makers.pop, storage._cdata, None)


def _size(tensor: Tensor) -> int:
    """Bytes of the places of a tensor that differ."""
    places = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places *= size if stride else 1
    return places * tensor.element_size()


def _over_cells(name: str, args: Any, read: list[Tensor], made: list[Tensor]) -> bool:
    """Whether an operator sums over the first axis, which is that of cells or rows."""
    if name == "native_layer_norm_backward":
        return True
    before, after = read[0], made[0]
    rows_left = before.dim() > 1 and before.numel() >= before.shape[0] * after.numel()
    return rows_left and (after.dim() == 0 or after.shape[-1] == before.shape[-1])


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    if name.startswith("published_ssd"):
        x, _, _, b = args[:4] if name == "published_ssd" else args[1:5]
        B, T, H, P = x.shape
        return (1 if name == "published_ssd" else 3) * ssd_flops(B, T, H * P, b.shape[2], b.shape[3])
    if name == "sparse_product":
        weight, indptr = args[:2]
        return 2 * (len(indptr) - 1) * weight.numel()
    if name == "sparse_product_gradient":
        return 2 * args[0].numel() * int(args[-1])
    counted = flop_registry.get(func.overloadpacket)
    return int(counted(*args, **kwargs, out_val=out)) if counted else 0
