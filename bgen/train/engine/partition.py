"""Where a rank keeps its share of the weights and of the optimiser's state at each ZeRO stage.

DeepSpeed's optimisers work on flat float32 tensors. This module says which elements of which parameter lie where in
them. That is all it takes to save them, and to restore them at another stage or number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bgen.checkpoint import shards
from bgen.checkpoint.shards import Shards

MOMENTUM = "momentum_buffer"
"""Muon's state; at ZeRO 1 and 2 it holds whole matrices, not the rank's share."""


@dataclass(frozen=True)
class Piece:
    """``count`` elements of the parameter ``name`` from ``start`` on lie at ``offset`` in a flat tensor."""

    name: str
    start: int
    offset: int
    count: int


@dataclass(frozen=True)
class Flat:
    """A tensor that the optimiser updates, and the pieces of parameters in it.

    ``number`` is DeepSpeed's number of the tensor, ``momentum`` are the pieces in Muon's state.
    """

    tensor: Tensor
    number: int
    pieces: list[Piece]
    momentum: list[Piece]


class Partition:
    """This rank's share of the weights and the optimiser's state.

    Parameters
    ----------
    engine
        DeepSpeed's engine.
    module
        The module that it trains.
    stage
        ZeRO stage.
    """

    def __init__(self, engine: Any, module: nn.Module, stage: int) -> None:
        self.stage = stage
        self._zero = engine.optimizer
        # The optimiser proper; without ZeRO and in float32, DeepSpeed does not wrap it.
        self._inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
        make = {0: self._whole, 3: self._by_parameter}.get(stage, self._by_group)
        self.flats: list[Flat] = make(trained)

    def _whole(self, trained: dict[str, nn.Parameter]) -> list[Flat]:
        found = []
        for number, (name, parameter) in enumerate(trained.items()):
            pieces = [Piece(name, 0, 0, parameter.numel())]
            found.append(Flat(parameter, number, pieces, pieces))
        return found

    def _by_group(self, trained: dict[str, nn.Parameter]) -> list[Flat]:
        """ZeRO 1 and 2: each group of parameters is flattened and cut into one part per rank."""
        names = {parameter: name for name, parameter in trained.items()}
        # Pure bf16 has an optimiser of its own at ZeRO 1.
        groups = self._zero.bit16_groups if hasattr(self._zero, "bit16_groups") else self._zero.bf16_groups
        found = []
        for number, group in enumerate(self._inner.param_groups):
            pieces, momentum, end = [], [], 0
            for parameter in groups[number]:
                mapping = parameter._hp_mapping
                if mapping is None:  # all of it is another rank's
                    continue
                inside, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                pieces.append(Piece(names[parameter], inside.start, place.start, place.numel))
                momentum.append(Piece(names[parameter], 0, end, parameter.numel()))
                end += parameter.numel()
            found.append(Flat(group["params"][0], number, pieces, momentum))
        return found

    def _by_parameter(self, trained: dict[str, nn.Parameter]) -> list[Flat]:
        """ZeRO 3: each parameter is cut into one part per rank, the last ones padded."""
        by_group: dict[int, list[Piece]] = {}
        for name, parameter in trained.items():
            number, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = dist.get_rank() * size
            count = max(0, min(size, math.prod(self.shapes[name]) - start))
            by_group.setdefault(number, []).append(Piece(name, start, offset, count))
        flats = enumerate(self._zero.fp32_partitioned_groups_flat)
        return [Flat(tensor, number, by_group[number], by_group[number]) for number, tensor in flats]

    def _swapped(self, flat: Flat) -> bool:
        return self.stage == 3 and bool(self._zero._swappable_optimizer_subgroup(flat.number))

    @contextmanager
    def _resident(self, flat: Flat, changed: bool) -> Iterator[None]:
        """Within the context a flat tensor and its state are in memory, also if they live on NVMe."""
        if not self._swapped(flat):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(flat.number)
        try:
            yield
        finally:
            if changed:
                self._zero._optimizer_states_and_gradient_swap_out(flat.number)
            else:
                self._zero._release_swap_buffers(flat.number)

    def weights(self) -> dict[tuple[str, int], Tensor]:
        """Flat float32 views of the weights that this rank keeps, by name and first element (copies, if on NVMe)."""
        found = {}
        for flat in self.flats:
            with self._resident(flat, changed=False):
                source = flat.tensor.detach().view(-1)
                source = source.clone() if self._swapped(flat) else source
                for piece in flat.pieces:
                    if piece.count:
                        found[piece.name, piece.start] = source[piece.offset : piece.offset + piece.count]
        return found

    def snapshot(self) -> dict[str, Tensor]:
        """A copy, on the CPU, of this rank's weights and optimiser state, by the keys of a shard."""
        copy: dict[str, Tensor] = {}
        for flat in self.flats:
            with self._resident(flat, changed=False):
                state = self._inner.state.get(flat.tensor, {})
                tensors = {shards.WEIGHT: flat.tensor.detach()}
                tensors |= {shards.OPTIMIZER + n: t for n, t in state.items() if torch.is_tensor(t) and t.ndim > 0}
                for kind, tensor in tensors.items():
                    for piece in flat.momentum if kind == shards.OPTIMIZER + MOMENTUM else flat.pieces:
                        if piece.count:
                            part = tensor.view(-1)[piece.offset : piece.offset + piece.count]
                            copy[shards.key(kind, piece.start, piece.name)] = part.to("cpu", torch.float32, copy=True)
                if "step" in state:
                    step = torch.tensor(float(state["step"]))
                    copy |= {shards.key(shards.STEP, p.start, p.name): step for p in flat.pieces if p.count}
        return copy

    def restore(self, saved: Shards) -> None:
        """Overwrite this rank's weights and optimiser state with a checkpoint's.

        Raises
        ------
        KeyError
            If the checkpoint lacks some of them.
        """
        for flat in self.flats:
            with self._resident(flat, changed=True), torch.no_grad():
                self._fill(saved, shards.WEIGHT, flat.tensor, flat.pieces)
                state: dict[str, Any] = {}
                named = {piece.name for piece in flat.pieces}
                for kind in sorted(saved.kinds):
                    if kind.startswith(shards.OPTIMIZER) and named & set(saved.names(kind)):
                        name = kind.removeprefix(shards.OPTIMIZER)
                        pieces = flat.momentum if name == MOMENTUM else flat.pieces
                        size = sum(piece.count for piece in pieces) if name == MOMENTUM and self.stage != 3 else None
                        like = flat.tensor if size is None or self.stage == 0 else flat.tensor.new_empty(size)
                        state[name] = torch.zeros_like(like, requires_grad=False)
                        self._fill(saved, kind, state[name], pieces)
                steps = max((saved.step(name) for name in named), default=0.0)
                if steps:
                    state["step"] = self._step_counter(flat, steps)
                if state:
                    self._put_state(flat.tensor, state)

    def _step_counter(self, flat: Flat, steps: float) -> Tensor:
        """Return the optimiser's counter, where it looks for it: beside the weights, if its kernels read it there."""
        beside = any(group.get("fused") or group.get("capturable") for group in self._inner.param_groups)
        return torch.tensor(steps, dtype=torch.float32, device=flat.tensor.device if beside else "cpu")

    def _put_state(self, tensor: Tensor, state: dict[str, Any]) -> None:
        existing = self._inner.state[tensor]
        for name, value in state.items():
            if torch.is_tensor(existing.get(name)) and existing[name].shape == value.shape:
                existing[name].copy_(value)  # also where DeepSpeed has registered the storage for NVMe
            else:
                existing[name] = value

    @staticmethod
    def _fill(saved: Shards, kind: str, tensor: Tensor, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.count:
                values = saved.read(kind, piece.name, piece.start, piece.count)
                tensor.view(-1)[piece.offset : piece.offset + piece.count].copy_(values)
