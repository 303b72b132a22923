"""Pairs of control and perturbed cells: the training data of the perturbation flow.

Nobody measures a cell twice, so a perturbed cell is paired with control cells of its stratum (cell type, batch, time:
whatever the user names). Pairs are drawn anew at each step. Within a stratum and a set of perturbations the cells of a
batch are paired by optimal transport in the latent space, so that paths are short and do not cross.

Axes: N cells, B pairs, K perturbations of a set, D latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from bgen.config.finetune import FinetuneConfig
from bgen.data.batch import CellBatch
from bgen.data.cells_in_memory import MemoryCells
from bgen.distributed.world import World
from bgen.models.generators.perturbation_flow import PairBatch, PerturbationFlow
from bgen.train.stages.in_memory import MemoryStage


@dataclass(frozen=True)
class Screen:
    """Control and perturbed cells, ready to be paired.

    Attributes
    ----------
    mean, std
        ``[N, D + 1]``: whitened posterior of each cell; the log library size, last, has standard deviation 0.
    label, stratum
        int64 ``[N]``: number of the set of perturbations and dose (-1: control), and of the stratum.
    known, gene, dose, there
        ``[number of labels, K]``: see :class:`bgen.models.generators.perturbation_flow.PerturbationSet`.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    label: NDArray[np.int64]
    stratum: NDArray[np.int64]
    known: NDArray[np.int64]
    gene: NDArray[np.int64]
    dose: NDArray[np.float32]
    there: NDArray[np.bool_]


@dataclass(frozen=True)
class Pairs:
    """Numbers of the perturbed cells ``[B]`` and the whitened latents of both sides ``[B, D + 1]``."""

    rows: NDArray[np.int64]
    perturbed: NDArray[np.float32]
    control: NDArray[np.float32]


class PairStage(MemoryStage):
    """Trains a :class:`PerturbationFlow` on pairs; ``train`` and ``valid`` are perturbed cells."""

    def __init__(
        self,
        config: FinetuneConfig,
        module: PerturbationFlow,
        cells: MemoryCells,
        screen: Screen,
        train: NDArray[np.int64],
        valid: NDArray[np.int64],
        world: World,
        fingerprint: dict[str, Any],
    ) -> None:
        super().__init__(config, module, cells, train, valid, world, fingerprint)
        self.screen, self.coupling = screen, config.perturb.coupling
        controls = np.flatnonzero(screen.label < 0)
        self.controls = {int(s): controls[screen.stratum[controls] == s] for s in np.unique(screen.stratum)}
        self.everywhere = controls

    def prepare(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Pairs:
        """Draw a control cell for each perturbed one."""
        screen = self.screen
        partner = np.empty(len(rows), np.int64)
        for stratum in np.unique(screen.stratum[rows]):
            here = screen.stratum[rows] == stratum
            pool = self.controls[int(stratum)]
            partner[here] = rng.choice(pool if len(pool) else self.everywhere, int(here.sum()))
        perturbed, control = (self._draw(cells, rng) for cells in (rows, partner))
        if self.coupling == "ot":
            groups = screen.label[rows] * (screen.stratum.max() + 1) + screen.stratum[rows]
            for group in np.unique(groups):
                here = np.flatnonzero(groups == group)
                if len(here) > 1:
                    _, best = linear_sum_assignment(cdist(perturbed[here], control[here], "sqeuclidean"))
                    control[here] = control[here[best]]
        return Pairs(rows, perturbed, control)

    def batch(self, prepared: Pairs, keys: NDArray[np.uint64], part: slice, step: int) -> CellBatch:
        """See :class:`MemoryStage`."""
        rows, screen = prepared.rows[part], self.screen
        label = screen.label[rows]
        cells = self.cells.batch(rows, keys[part], step, part.start)
        return PairBatch(
            **cells.__dict__,
            perturbed=torch.from_numpy(prepared.perturbed[part]),
            control=torch.from_numpy(prepared.control[part]),
            known=torch.from_numpy(screen.known[label]),
            gene=torch.from_numpy(screen.gene[label]),
            dose=torch.from_numpy(screen.dose[label]),
            there=torch.from_numpy(screen.there[label]),
        )

    def _draw(self, cells: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
        """Draw posterior samples: they, and not their means, are what the decoder was trained on."""
        noise = rng.standard_normal(self.screen.mean[cells].shape).astype(np.float32)
        return self.screen.mean[cells] + self.screen.std[cells] * noise
