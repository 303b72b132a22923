"""The codec of cells whose latents are given, not encoded from counts.

Axes: n cells of the table, B cells of a batch, D dimensions that flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.models.codec import Codec


class MeasuredLatents(Codec):
    """Looks the latents up by the cells' numbers.

    For measurements that are continuous already (principal components, protein levels, published benchmarks); flow,
    patterns and backbones are the same code as for counts. The last dimension takes the place of the log library size.

    Parameters
    ----------
    table
        float32 ``[n, D]``, whitened.
    """

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__(table.shape[1] - 1, 0, {})
        self.register_buffer("table", table)

    def latents(self, batch: CellBatch) -> Tensor:
        """Return the latents ``[B, D]`` of the cells."""
        return self.table[batch.cells]

    def decode(
        self, z: Tensor, library: Tensor, covariates: Mapping[str, Tensor], keys: Tensor | None = None
    ) -> NoReturn:
        """Raise UserError: there are no counts behind these latents."""
        raise UserError("This flow is over measured latents: it generates those, and there are no counts to decode.")

    def latents_flops(self, cells: int, nonzeros: int) -> int:
        """None: a table is read."""
        return 0
