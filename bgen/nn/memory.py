"""Memory of the device that a network is on: how much is free, and how much a computation takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bgen.memory import free_memory


def free_on(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that this process may still take on a device.

    On CUDA what is free there, and what torch keeps for the next tensors. On a CPU, this process's part of what is free
    on the host (:func:`bgen.memory.free_memory`); on Apple's GPUs the same, as they share that memory, and no more than
    the system recommends.

    Parameters
    ----------
    processes
        How many processes of this host take a part.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = free_memory() // processes
    if device.type == "mps":
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(free)


def give_back(device: torch.device) -> None:
    """Give back what torch keeps of a device's memory for the next tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def activation_bytes(step: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Run a forward pass and return the bytes that live at its peak, and once more the largest tensor.

    The backward pass needs the gradient of the largest activation beside it.

    Parameters
    ----------
    step
        Returns the loss.
    known
        Tensors that do not count: parameters, buffers, the batch.
    """
    with LiveBytes(known) as live:
        loss = step()
    del loss
    return live.peak + live.largest


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, while they live.

    Attributes
    ----------
    live, peak, largest
        Bytes now, at most so far, and of the largest storage.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known and key not in self._counted:
                    self.live += size
                    self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
                    weakref.finalize(storage, self._drop, key, size)
                    self._counted.add(key)
        return out

    def _drop(self, key: int, size: int) -> None:
        self.live -= size
        self._counted.discard(key)
