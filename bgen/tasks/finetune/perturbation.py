"""Fine-tuning for ``perturb``: the flow from control to perturbed cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray

from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.evaluate.protocols.perturbation_scores import PerturbationScores
from bgen.genes.network import Network, read_network
from bgen.hub.about import About, EffectOf, EffectScale, Perturbation, RegulatoryNetwork
from bgen.hub.directory import Module, SavedModel
from bgen.models.generators.perturbation_flow import PerturbationFlow
from bgen.progress import Say
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.columns import require_column
from bgen.tasks.finetune.request import Request
from bgen.tasks.finetune.task import Job, Task
from bgen.tasks.perturb.effect_scale import fit_scale
from bgen.tasks.perturb.effects import fit_effects
from bgen.tasks.perturb.held_out import require_scorable, score_held_out, split_rows
from bgen.tasks.perturb.screen import (
    Columns,
    gene_rows,
    read_doses,
    read_screen,
    require_controls,
    require_plain_counts,
)
from bgen.tasks.user_cells import UserCells, UserData
from bgen.train.stages.in_memory import split_watched
from bgen.train.stages.perturbation_pairs import PairStage


class Perturb(Task[Network | None]):
    """Control cells under a perturbation; prepared is the regulatory network, if one is given."""

    def require(self, request: Request) -> None:
        """See :class:`Task`."""
        if request.columns is None:
            raise UserError(
                "--task perturb needs --perturbation (an obs column) and --control (its value for controls)."
            )

    def check(self, parent: SavedModel, adata: AnnData, request: Request) -> None:
        """See :class:`Task`."""
        columns = _columns(request)
        for name in columns.strata:
            require_column(adata, name)
        given = columns.labels(adata)
        control = require_controls(given, columns)
        if (control | (given == "")).all():
            raise UserError(f"All cells of obs['{columns.perturbation}'] are controls: there is nothing to learn from.")
        read_doses(adata, columns, given)

    def resolve(self, data: UserData, request: Request) -> Request:
        """See :class:`Task`."""
        return replace(request, columns=_columns(request).resolved(data.adata))

    def understood(self, adata: AnnData, request: Request) -> list[str]:
        """See :class:`Task`."""
        return _columns(request).sentences(adata)

    def hold_out(self, data: UserData, request: Request, seed: int) -> tuple[UserData, UserData | None]:
        """See :class:`Task`."""
        if not request.hold_out:
            return data, None
        train, back = split_rows(data.adata, _columns(request), request.hold_out, seed)
        return data[train], data[back]

    def prepare(self, grown: SavedModel, adata: AnnData, request: Request) -> Network | None:
        """See :class:`Task`."""
        return None if request.network is None else read_network(request.network, grown.genes)

    def require_scorable(self, grown: SavedModel, cells: UserCells, kept_back: UserData, request: Request) -> None:
        """See :class:`Task`."""
        require_scorable(cells, kept_back.adata, _columns(request), grown.genes)

    def train(self, job: Job, prepared: Network | None) -> tuple[Module, About]:
        """See :class:`Task`."""
        model, config, request, runs = job.model, job.settings("perturb", "perturbation"), job.request, job.runs
        network, columns = prepared, _columns(request)
        vae = model.saved.vae
        require_plain_counts(vae)
        data = read_screen(model, job.cells, columns)
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
        said = Perturbation(
            perturbations=data.names,
            strata=list(columns.strata),
            column=columns.perturbation,
            controls=list(columns.controls),
            separator=columns.grammar.separator,
            effects=[EffectOf(set=list(names), dose=dose) for names, dose in zip(effects.sets, doses, strict=True)],
            effect_scale=scale,
            network=used,
        )
        told: dict[str, Any] = {"perturbation": said, "control": columns.controls[0]}
        if columns.dose is not None:
            told["roles"] = {**job.about.roles, "dose": columns.dose}
            rest = {role: unit for role, unit in job.about.units.items() if role != "dose"}
            told["units"] = rest | ({"dose": columns.dose_unit} if columns.dose_unit else {})
        return flow, job.about.model_copy(update=told)

    def score(
        self, model: AnnDataModel, cells: UserCells, kept_back: UserCells, request: Request, say: Say
    ) -> PerturbationScores | None:
        """See :class:`Task`."""
        return score_held_out(model, cells, kept_back, _columns(request), say=say)


def _columns(request: Request) -> Columns:
    assert request.columns is not None, "checked at the start"
    return request.columns
