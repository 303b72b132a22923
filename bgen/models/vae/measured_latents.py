"""The identity encoder: cells whose latents are given, not encoded from counts.

Axes: n cells of the table, B cells of a batch, D dimensions that flow.
"""

from __future__ import annotations

from torch import Tensor

from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.models.vae.vae import VAE


class MeasuredLatents(VAE):
    """Stands where a trained VAE stands, and looks the latents up by the cells' numbers.

    For measurements that are continuous already (principal components, protein levels, published benchmarks): the
    flow, its patterns and its backbones are then the same code as for counts. The last dimension takes the place of the
    log library size.

    Parameters
    ----------
    table
        float32 ``[n, D]``, whitened.
    """

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__(VAEConfig(latent=table.shape[1] - 1, hidden=1, blocks=0), 1, {})
        self.register_buffer("table", table)

    def latents(self, batch: CellBatch) -> Tensor:
        """Return the latents ``[B, D]`` of the cells."""
        return self.table[batch.cells]
