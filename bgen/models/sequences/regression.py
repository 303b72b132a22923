"""Training of a sequence encoder by regression: what training genes do, told from their sequences alone.

    loss = mean over genes and targets of (head(f(s_g)) - y_g)^2 weight

It takes minutes on a CPU for some thousands of genes, all in memory, so it does without the trainer of cells and its
checkpoints. What is kept is the moving average of the weights.

Axes: G genes, L positions, F size of a vector, Y targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bgen.arrays import F32, F64
from bgen.config.sequences import SequenceConfig, SequenceTraining
from bgen.errors import UserError
from bgen.genes.sequences import UNKNOWN, Codes
from bgen.models.sequences.encoder import SequenceEncoder
from bgen.nn.decay import decays

WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
AVERAGED = 0.98
"""Weight of the past in the moving average of the weights; less in the first steps."""
AT_ONCE = 256
CLIP = 1.0


class SequenceRegression(nn.Module):
    """An encoder of sequences, and a linear map from its vectors to targets."""

    def __init__(self, config: SequenceConfig, length: int, targets: int) -> None:
        super().__init__()
        self.encoder = SequenceEncoder(config, length)
        self.head = nn.Linear(config.size, targets)
        nn.init.zeros_(self.head.weight)  # the start is the mean of the training genes
        nn.init.zeros_(self.head.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the targets ``[G, Y]``, standardised, of codes ``[G, L]``."""
        return self.head(self.encoder(codes))


@dataclass(frozen=True)
class Fitted:
    """A trained network, and the scale of its targets ``[Y]``."""

    network: SequenceRegression
    mean: F64
    scale: F64

    def vectors(self, codes: Codes) -> F32:
        """Return vectors ``[G, F]``."""
        return self._of(self.network.encoder, codes)

    def predict(self, codes: Codes) -> F64:
        """Return targets ``[G, Y]`` on their own scale."""
        return self._of(self.network, codes).astype(np.float64) * self.scale + self.mean

    @torch.no_grad()
    def _of(self, part: nn.Module, codes: Codes) -> F32:
        parts = [part(torch.from_numpy(codes[at : at + AT_ONCE])) for at in range(0, len(codes), AT_ONCE)]
        return torch.cat(parts).numpy()


def fit_sequences(
    codes: Codes,
    targets: F64,
    weights: F64,
    config: SequenceConfig,
    training: SequenceTraining,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train on codes ``[G, L]`` and targets ``[G, Y]``, of ``weights`` [Y] once each target has variance 1.

    Raises
    ------
    UserError
        If the loss is no longer a number.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 62])
    mean, scale = targets.mean(0), np.maximum(targets.std(0), 1e-9)
    y = torch.from_numpy(((targets - mean) / scale).astype(np.float32))
    weight = torch.from_numpy((weights / weights.sum()).astype(np.float32))
    network = SequenceRegression(config, codes.shape[1], targets.shape[1]).train()
    per_epoch = max(len(codes) // training.batch, 1)
    total = training.epochs * per_epoch
    optimiser = torch.optim.AdamW(_groups(network, training.weight_decay), lr=training.learning_rate)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    for step in range(total):
        if step % per_epoch == 0:
            order = rng.permutation(len(codes))
        rows = order[step % per_epoch * training.batch :][: training.batch]
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * _rate(step / total)
        batch = torch.from_numpy(shifted(codes[rows], rng, training.shift))
        loss = ((network(batch) - y[rows]).square() * weight).sum(1).mean()
        if not bool(loss.isfinite()):
            raise UserError(f"The loss of the sequences is no number at step {step}: choose a lower learning rate.")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimiser.step()
        past = min(AVERAGED, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            if value.is_floating_point():  # not how many batches a norm has seen
                average[name].lerp_(value, 1 - past)
        if progress is not None:
            progress(step + 1, total)
    network.load_state_dict(average)
    return Fitted(network.eval(), mean, scale)


def shifted(codes: Codes, rng: np.random.Generator, most: int) -> Codes:
    """Return each sequence moved by up to ``most`` positions to one side; what comes in is not known."""
    moved = np.full_like(codes, UNKNOWN)
    L, steps = (
        codes.shape[1],
        rng.integers(-min(most, codes.shape[1] - 1), min(most, codes.shape[1] - 1) + 1, len(codes)),
    )
    for row, step in enumerate(steps):
        moved[row, max(step, 0) : L + min(step, 0)] = codes[row, max(-step, 0) : L - max(step, 0)]
    return moved


def _rate(done: float) -> float:
    """Return the learning rate over its peak: a rise, then a cosine to zero."""
    if done < WARMUP:
        return done / WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))


def _groups(network: nn.Module, decay: float) -> list[dict[str, object]]:
    """Return the parameters, those that decay apart."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts[decays(module, name)].append(parameter)
    return [{"params": parts[True], "weight_decay": decay}, {"params": parts[False], "weight_decay": 0.0}]
