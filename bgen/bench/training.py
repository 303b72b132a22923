"""One training of a benchmark: whole, or the benchmark ends."""

from __future__ import annotations

from collections.abc import Sequence

from bgen.config.load import load_config
from bgen.errors import UserError
from bgen.train.run import train


def train_whole(name: str, overrides: Sequence[str]) -> None:
    """Train what the configuration ``name`` with ``overrides`` says, and export it to ``out/model``.

    Raises
    ------
    UserError
        If the settings do not fit, or a signal stopped the training: half a training is not what is compared.
    """
    done = train(load_config(name, overrides))
    if done.interrupted:
        raise UserError(f"Stopped by a signal at step {done.step}; nothing was measured.")
