"""Rows of ``bgen bench cells --direct``: cells of a flow on log counts, and of the latent flow, as expectations.

Axes: n cells, G genes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.likelihoods.sampling import sample_negative_binomial
from bgen.order.keys import hash_keys
from bgen.tasks.generate import draw_rows, sample_settings
from bgen.tasks.load import Model

AS_THEY_COME = "direct flow, as it comes"
LATENT_MEANS = "bgen, means instead of counts"

POISSON = 1e6
"""Inverse dispersion from which on a negative binomial is Poisson."""


@torch.no_grad()
def expectations(model: Model, n: int, steps: int, seed: int) -> NDArray[np.float32]:
    """Return the expected counts ``[n, G]`` of cells that a model generates, as its generation draws counts from them.

    Conditions are drawn as the training cells have them.
    """
    saved, flow = model.saved, model.saved.module
    assert isinstance(flow, LatentFlow)
    rows, _ = draw_rows(saved.combinations, {}, n, seed)
    columns = {name: torch.from_numpy(values) for name, values in rows.items()}
    keys = torch.from_numpy(hash_keys(seed, np.arange(n)).view(np.int64))
    conditions = {name: columns[name] for name in flow.conditions.names}
    made = flow.sample(conditions, n, keys, sample_settings(saved.sample, steps=steps))
    state, log_library = flow.vae.unwhiten(made)
    covariates = {name: columns[name] for name in flow.vae.covariates}
    expected: NDArray[np.float32] = flow.vae.decode(state, log_library.exp(), covariates).mean.numpy()
    return expected


def direct_rows(model: Model, genes: NDArray[np.intp], n: int, steps: int, seed: int) -> dict[str, sparse.csr_matrix]:
    """Return the rows of a flow on log counts: its expectations of some ``genes``, and counts made of them."""
    expected = expectations(model, n, steps, seed)
    keys = torch.from_numpy(hash_keys(seed, np.arange(n)).view(np.int64))
    theta = torch.full((expected.shape[1],), POISSON)
    drawn = sample_negative_binomial(torch.from_numpy(expected), theta, keys).numpy()
    made = {AS_THEY_COME: expected, "direct flow, rounded": np.rint(expected), "direct flow, Poisson": drawn}
    return {row: sparse.csr_matrix(values[:, genes], dtype=np.float32) for row, values in made.items()}


def latent_means(model: Model, genes: NDArray[np.intp], n: int, steps: int, seed: int) -> dict[str, sparse.csr_matrix]:
    """Return the row of a latent flow whose cells are left as expectations."""
    return {LATENT_MEANS: sparse.csr_matrix(expectations(model, n, steps, seed)[:, genes])}
