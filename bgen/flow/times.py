"""Flow times for training, keyed per item.

Axes: B trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgen.nn.gpu.draws import normal, uniform
from bgen.nn.random import Stream

_GOLDEN_RATIO = 0.6180339887498949
_PLACE = 2**40  # more steps than any training has


def sample_times(kind: str, keys: Tensor, slots: Tensor, step: int, places: Tensor | None = None) -> Tensor:
    """Draw flow times float32 ``[B]`` in (0, 1).

    Parameters
    ----------
    kind
        ``uniform``: independent. ``logit_normal``: the logistic function of a standard normal, denser around 1/2
        (Esser et al., 2024). ``stratified``: uniform for each item, and spread evenly over the global batch: slot ``i``
        takes the fractional part of ``i * golden ratio + u(step, place)``, a low-discrepancy sequence that any slice of
        the batch can evaluate by itself. It lowers the variance of the loss and its gradient.
    keys
        int64 ``[B]``, one per item.
    slots
        int64 ``[B]``: places of the items in the global batch; used by ``stratified``.
    step
        Optimiser step; used by ``stratified``.
    places
        int64 ``[B]``: place of an item among those that share its slot, such as the time points of a trajectory; used
        by ``stratified``. Times at two places are independent of each other. Default: 0 everywhere.
    """
    if kind == "uniform":
        return uniform(keys, Stream.FLOW_TIME, 1).squeeze(1)
    if kind == "logit_normal":
        return torch.sigmoid(normal(keys, Stream.FLOW_TIME, 1).squeeze(1))
    assert kind == "stratified", kind
    drawn = step + (torch.zeros_like(slots) if places is None else places * _PLACE)
    offset = uniform(drawn, Stream.FLOW_TIME, 1).double().squeeze(1)
    return torch.frac(slots.double() * _GOLDEN_RATIO + offset).clamp(1e-6, 1 - 1e-6).float()
