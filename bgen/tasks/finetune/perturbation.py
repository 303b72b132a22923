"""Fine-tuning for ``perturb``: the flow from control to perturbed cells."""

from __future__ import annotations

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray

from bgen.config.finetune import FinetuneConfig
from bgen.distributed import world as ranks
from bgen.genes.network import Network
from bgen.hub.about import EffectOf, EffectScale, Perturbation, RegulatoryNetwork
from bgen.models.generators.perturbation_flow import PerturbationFlow
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.finetune.request import Request
from bgen.tasks.finetune.runs import Runs
from bgen.tasks.perturb.effect_scale import fit_scale
from bgen.tasks.perturb.effects import fit_effects
from bgen.tasks.perturb.screen import gene_rows, read_screen, require_plain_counts
from bgen.train.stages.in_memory import split_watched
from bgen.train.stages.perturbation_pairs import PairStage


def _train_perturbation(
    model: AnnDataModel,
    adata: AnnData,
    config: FinetuneConfig,
    request: Request,
    network: Network | None,
    runs: Runs,
) -> tuple[PerturbationFlow, Perturbation]:
    assert request.columns is not None, "checked at the start"
    vae = model.saved.vae
    require_plain_counts(vae)
    data = read_screen(model, adata, request.columns, request.layer)
    rows = gene_rows(data.cells.counts[data.screen.label < 0], config.perturb.gene_components)
    regulated: NDArray[np.float32] | None = None
    if network is not None:
        runs.say(network.sentence(data.targets))
        regulator_rows, regulated = network.factors(config.perturb.gene_components**0.5)
        rows = np.concatenate([rows, regulator_rows], axis=1)
    effects = fit_effects(data, data.labels)
    flow = PerturbationFlow(
        config.perturb,
        vae,
        len(data.names),
        torch.from_numpy(rows),
        data.dose_scale,
        torch.from_numpy(effects.values),
        None if regulated is None else torch.from_numpy(regulated),
    )
    train, valid = split_watched(np.flatnonzero(data.screen.label >= 0), 0.1, config.seed)
    stage = PairStage(
        config, flow, data.cells, data.screen, train, valid, ranks.current(), runs.fingerprint(model.saved)
    )
    runs.fit(config, stage)
    scale = EffectScale()
    if config.perturb.scale:
        scale = ranks.from_main(fit_scale(flow, data, config.seed) if ranks.current().rank == 0 else scale)
    doses = [None if np.isnan(dose) else float(dose) for dose in effects.doses]
    used: RegulatoryNetwork | None = None
    if network is not None and regulated is not None:
        used = RegulatoryNetwork(
            components=len(regulated), edges=network.weights.nnz, edges_in_file=network.edges_in_file
        )
    return flow, Perturbation(
        perturbations=data.names,
        strata=list(request.columns.strata),
        effects=[EffectOf(set=list(names), dose=dose) for names, dose in zip(effects.sets, doses, strict=True)],
        effect_scale=scale,
        network=used,
    )
