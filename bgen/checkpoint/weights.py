"""The weights to export, from the newest checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from bgen.checkpoint import files
from bgen.checkpoint.shards import Shards
from bgen.errors import UserError


def export_weights(root: Path) -> tuple[dict[str, Tensor], Path]:
    """Return the weights to export from the newest undamaged checkpoint below ``root``, and its folder.

    The best ones where the run keeps them, else the moving average, else the last; trained parameters in float32.

    Raises
    ------
    UserError
        If there is no usable checkpoint.
    """
    messages = []
    for folder in files.committed(root):
        found = files.damage(folder)
        if found is None:
            return Shards(folder).export(), folder
        messages.append(f"{folder.name} is damaged ({found})")
    raise UserError(f"No usable checkpoint in {root}. {'; '.join(messages) or 'There is none.'}")
