"""Code traced for a GPU where there is none: shapes, dtypes and devices are followed, and nothing is computed.

Tensors are torch's FakeTensors on ``cuda:0``, or on ``mps:0`` for what users do on Apple's GPUs. They refuse what
depends on data (``.item()``, ``nonzero``, a boolean index), which is what makes the host wait for a GPU, and operators
between devices. :class:`Watch` refuses what they let pass: copies that wait, tensors on the CPU among those on the GPU,
and float64 on Apple's.

A CPU build of torch misses two things for that. A device guard, which says what a device's stream is: here the one of
"meta" tensors, which does nothing, stands in CUDA's place. And an accelerator, which the autograd engine asks for:
:func:`backward` walks the graph in Python instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, MPS = torch.device("cuda", 0), torch.device("mps", 0)

Batch = TypeVar("Batch")
Module = TypeVar("Module", bound=nn.Module)


class WaitError(Exception):
    """What was traced makes the host wait for the device."""


class OnCPUError(Exception):
    """What was traced computes with a tensor on the CPU."""


class WideError(Exception):
    """What was traced makes float64 on Apple's GPUs, which they lack."""


REFUSED = (WaitError, OnCPUError, DataDependentOutputException, DynamicOutputShapeException)
"""What is raised when something waits, or is on the CPU."""

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Watch(TorchDispatchMode):
    """Refuses copies that the host waits for, and tensors of the CPU in operators on the device.

    Parameters
    ----------
    kind
        Of device.

    Attributes
    ----------
    taken
        Copies from the device to the host within :meth:`taking`.
    strict
        Whether copies are refused at all; a verb of a user may wait for what it brings and fetches.
    products
        dtypes of matrix products.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.taken = 0
        self.strict = True
        self.products: set[torch.dtype] = set()
        self._taking = False

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Within this, copies to the host are counted and not refused."""
        self._taking = True
        try:
            yield
        finally:
            self._taking = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _COPIES:
            self._copy(func, args, kwargs)
        elif any(t.device.type == self.kind for t in tensors):
            here = [t for t in tensors if t.device.type == "cpu" and t.dim() > 0]  # a scalar of the CPU is an argument
            if here:
                raise OnCPUError(f"{func} takes a tensor {list(here[0].shape)} that is on the CPU")
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.products.add(tensors[-1].dtype)
        made = func(*args, **kwargs)
        for out in tree_leaves(made) if self.kind == "mps" else ():
            if isinstance(out, Tensor) and out.device.type == "mps" and out.dtype == torch.float64:
                raise WideError(f"{func} makes float64 {list(out.shape)}")
        return made

    def _copy(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is torch.ops.aten.copy_.default:
            to, source, waits = args[0].device, args[1], not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if source.dim() == 0 and source.device.type == "cpu":
                return  # filled with the number
        else:
            source = args[0]
            to, waits = torch.device(kwargs.get("device") or source.device), not kwargs.get("non_blocking")
        if source.device.type == to.type:
            return
        if to.type == "cpu":
            if self.strict and not self._taking:
                raise WaitError("a copy from the device to the host")
            self.taken += 1
        elif self.strict and waits:
            raise WaitError("a copy from the host to the device that is not non_blocking")


@contextmanager
def on_cuda(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give CUDA tensors a device guard that does nothing, and let autocast believe in them."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, mps, meta = 1, 13, 14  # c10::DeviceType
    before = guards[cuda], guards[mps]
    patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    patch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    if not torch.cuda.is_available():  # where there is a GPU, its own guard serves
        guards[cuda] = guards[meta]
    if not torch.backends.mps.is_available():
        guards[mps] = guards[meta]
    try:
        yield
    finally:
        guards[cuda], guards[mps] = before


class Trace:
    """One thing that is traced: what it is given comes onto the device first, by :meth:`module` and :meth:`batch`."""

    def __init__(self, device: torch.device = CUDA) -> None:
        self.device = device
        self.mode = FakeTensorMode(allow_non_fake_inputs=False)
        self.watch = Watch(device.type)

    @contextmanager
    def __call__(self, *, autocast: bool = True) -> Iterator[Watch]:
        """Trace what runs within this, in mixed precision as training runs it."""
        with self.mode, self.watch, torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            yield self.watch

    @contextmanager
    def verb(self) -> Iterator[Watch]:
        """Trace a user's verb, which may copy back and forth; arrays that come of tensors are ones."""

        def numpy(tensor: Tensor) -> Any:
            if tensor.device.type != "cpu":
                raise OnCPUError(f"an array is asked for of a tensor {list(tensor.shape)} that is on the device")
            return np.ones(tensor.shape, str(tensor.dtype).removeprefix("torch."))

        self.watch.strict = False
        with pytest.MonkeyPatch.context() as patch, self(autocast=False) as watch:
            patch.setattr(Tensor, "numpy", numpy)
            patch.setattr("bgen.models.backbones.stack.check_times", lambda *_: None)  # on the CPU, by values
            yield watch
        self.watch.strict = True

    def on_host(self, thing: Any) -> Any:
        """Return tensors, or what holds them, without their values, still on the CPU."""
        if isinstance(thing, Tensor):
            return self.mode.from_tensor(thing)
        if hasattr(thing, "__dataclass_fields__"):
            changed = {part.name: self.on_host(getattr(thing, part.name)) for part in fields(thing)}
            return replace(thing, **changed)
        return tree_map_only(Tensor, self.mode.from_tensor, thing)

    def tensor(self, thing: Tensor) -> Tensor:
        """Return the like of a tensor on the device."""
        with self.mode:
            return torch.empty(thing.shape, dtype=thing.dtype, device=self.device)

    def module(self, module: Module) -> Module:
        """Move a module, in place: its parameters and buffers lie on the device, and have no values."""
        seen: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    made = nn.Parameter(self.tensor(parameter), parameter.requires_grad)
                    part._parameters[name] = seen.setdefault(id(parameter), made)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else self.tensor(buffer)
        return module

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters, as the autograd engine does."""
        with self.mode, self.watch, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            # Blocks that are computed again are so once in a backward pass, which they tell by this number.
            patch.setattr("torch._C._current_graph_task_id", lambda: 0)
            _backward(loss)


def _backward(loss: Tensor) -> None:
    assert loss.grad_fn is not None, "nothing is trained"
    given: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in _in_order(loss.grad_fn):
        grads = given.pop(node, [])
        if not any(grad is not None for grad in grads):
            continue
        if hasattr(node, "variable"):
            leaf, (grad,) = node.variable, grads
            assert grad is not None
            assert (grad.dtype, grad.device, grad.shape) == (leaf.dtype, leaf.device, leaf.shape)
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            continue
        for (onward, number), grad in _apply(node, grads):
            if onward is None or grad is None:
                continue
            wanted = onward._input_metadata[number]
            if grad.shape != wanted.shape:
                grad = grad.sum_to_size(wanted.shape)
            there = given.setdefault(onward, [])
            there += [None] * (number + 1 - len(there))
            held = there[number]
            there[number] = grad.to(wanted.dtype) if held is None else held + grad.to(wanted.dtype)


def _apply(node: Any, grads: list[Tensor | None]) -> list[tuple[Any, Tensor | None]]:
    """Call a node of the graph; return where each of its results goes, with the result."""
    if not isinstance(node, BackwardCFunction):
        found = node(*grads, *[None] * (len(node._input_metadata) - len(grads)))
        return list(zip(node.next_functions, found if isinstance(found, tuple) else (found,), strict=True))
    grads = grads + [None] * (len(node._input_metadata) - len(grads))
    for number, result in enumerate(node._input_metadata):
        if grads[number] is None and result.device.type == "cuda":  # no tensor: None was returned
            grads[number] = torch.zeros(result.shape, dtype=result.dtype, device=result.device)
    found = node.apply(*grads)  # a function of ours, which returns one for every argument
    found = [grad for grad, needed in zip(found, node.needs_input_grad, strict=True) if needed]
    return list(zip([onward for onward in node.next_functions if onward[0] is not None], found, strict=True))


def _in_order(root: Any) -> list[Any]:
    """All nodes of a graph, each before those that it leads to."""
    done: list[Any] = []
    seen = set()
    stack = [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(onward, False) for onward, _ in node.next_functions if onward is not None]
    return done[::-1]
