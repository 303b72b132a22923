"""``bgen bench atlas``: pretrain on simulated screens in many contexts, predict in contexts that training never saw.

The truth is simulated (presets of :mod:`data_tools.simulate.screens`: "lines", 16 contexts x 40 perturbations, effects
partly shared and partly the context's own; "crowd", 24 x 4, where only the population tells the answer). For each
number of training contexts a VAE and the flow along perturbations are trained with the shipped configurations; three
other contexts are predicted from their control cells alone, one is watched, and all is compared by the protocol
``perturbation-v4`` with baselines that see the same cells.

What a few perturbed cells of a new context add is measured with the largest number: the pretrained flow fine-tuned on
them, beside a flow trained on them alone, for the perturbations among them and for others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from anndata import AnnData
from rich.table import Table

from bgen.bench.runs import train_whole
from bgen.errors import UserError, nearest
from bgen.evaluate.protocols.perturbation import MIN_CELLS, HeldOut
from bgen.evaluate.protocols.perturbation_scores import MODEL, PerturbationScores, join
from bgen.evaluate.registry import PerturbationProtocol, find_protocol
from bgen.files import require_new_folder, write_h5ad
from bgen.progress import Say
from bgen.tasks.finetune.finetune import Request, finetune
from bgen.tasks.load import Model, load_model
from bgen.tasks.perturb.held_out import predict_held_out
from bgen.tasks.perturb.screen import Columns
from bgen.version import __version__
from data_tools.building.build import build
from data_tools.check.check import check
from data_tools.simulate.screens import SCREENS, simulate_screens

COLUMNS = Columns("perturbation", "control", strata=("cell_type",), separator="+")
PRESETS = ("lines", "crowd")
"""Screens with one dose and one time, so that a label is one perturbation."""

WATCHED, TESTED = 1, 3
"""Contexts that training watches, and that are predicted."""

FEW = 100
"""Perturbed cells of a new context that fine-tuning sees."""

QUIET = ("track.mlflow=false", "track.progress=false")
FIGURES = ("explained", "pearson", "specific", "calibration", "energy")


@dataclass(frozen=True)
class Size:
    """Preset, cells and genes of the atlas (None: the preset's), and steps of the VAE and the flow."""

    preset: str = "lines"
    cells: int | None = None
    genes: int | None = None
    vae_steps: int = 1500
    flow_steps: int = 2000


def bench_atlas(
    out: Path,
    contexts: Sequence[int],
    size: Size,
    *,
    seeds: int,
    overrides: Sequence[str] = (),
    say: Say,
) -> dict[str, PerturbationScores]:
    """Train and score, and write ``atlas.json``.

    Parameters
    ----------
    contexts
        Numbers of training contexts, each in a training of its own.
    overrides
        Of the flow's configuration.

    Returns
    -------
    dict
        What was trained on to its scores, over seeds.

    Raises
    ------
    UserError
        If there are not such screens, or not so many contexts.
    """
    if size.preset not in PRESETS:
        raise UserError(f"--preset: there are no screens '{size.preset}'.{nearest(size.preset, PRESETS)}")
    names = [f"line_{number:02d}" for number in range(1, SCREENS[size.preset].contexts + 1)]
    most = len(names) - WATCHED - TESTED
    if not contexts or min(contexts) < 1 or max(contexts) > most:
        raise UserError(f"--contexts: 1 to {most} of the {len(names)} simulated contexts can be trained on.")
    require_new_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[PerturbationScores]] = {}
    for seed in range(seeds):
        cells = simulate_screens(size.preset, cells=size.cells, genes=size.genes, seed=seed)
        for n in contexts:
            folder = out / "run"
            model = _pretrain(cells, names[:n], names[most : most + WATCHED], folder, size, seed, overrides)
            held = [one for name in names[-TESTED:] for one in _predict(model, cells, names[:n], name, seed)]
            scores = _score(model, cells, names[:n], held)
            found.setdefault(f"{n} contexts", []).append(scores)
            say(f"{n} contexts, seed {seed}: {scores.headline()}")
            if n == max(contexts):
                for key, some in _few(folder, model, cells, names[:n], names[-1], seed).items():
                    found.setdefault(key, []).append(some)
                    say(f"{key}, seed {seed}: {some.headline()}")
            shutil.rmtree(folder)
    scores_of = {key: join(parts, "seeds" if _alike(parts) else "perturbations") for key, parts in found.items()}
    told = {key: scores.as_json() for key, scores in scores_of.items()}
    facts = {"bgen": __version__, "seeds": seeds, "overrides": list(overrides), **vars(size)}
    (out / "atlas.json").write_text(json.dumps({**facts, "trained on": told}, indent=1) + "\n", encoding="utf-8")
    return scores_of


def atlas_table(found: dict[str, PerturbationScores]) -> Table:
    """Return the figures of the model and of the best baseline, a row for each training."""
    table = Table(title="unseen contexts, from their control cells alone")
    for heading in ("trained on", "row", *FIGURES):
        table.add_column(heading, justify="left" if heading in ("trained on", "row") else "right")
    for key, scores in found.items():
        for row in (MODEL, *scores.baselines):
            values = [scores.mean(row, figure) if figure in scores.figures[row] else np.nan for figure in FIGURES]
            table.add_row(key, row, *("" if np.isnan(value) else f"{value:.3f}" for value in values))
    return table


def _pretrain(
    cells: AnnData,
    train: Sequence[str],
    watched: Sequence[str],
    folder: Path,
    size: Size,
    seed: int,
    overrides: Sequence[str],
) -> Model:
    """Train the VAE and the flow on some contexts; nothing of any other is seen."""
    (folder / "data").mkdir(parents=True)
    here = cells[np.isin(cells.obs["cell_type"].to_numpy(str), [*train, *watched])]
    obs, told = here.obs[["cell_type", "perturbation"]], {"organism": cells.uns["organism"]}
    write_h5ad(AnnData(here.X, obs=obs, var=here.var, uns=told), folder / "data" / "cells.h5ad")
    report = check([folder / "data" / "cells.h5ad"])
    store = folder / "data" / "store"
    build(
        report,
        store,
        created_by=f"bgen {__version__}",
        splits={"train": 0.9, "valid": 0.1},
        split_by="cell_type",
        held_out={"valid": list(watched)},
        seed=seed,
    )
    common = [f"data.store={store}", f"seed={seed}", *QUIET]
    small = ["vae.latent=32", "vae.hidden=128", "vae.blocks=1"]
    train_whole("vae", [*common, *small, f"out={folder / 'vae'}", f"train.steps={size.vae_steps}"])
    flow = [f"out={folder / 'flow'}", f"flow.vae={folder / 'vae'}", f"train.steps={size.flow_steps}"]
    train_whole("perturbation", [*common, *flow, *overrides])
    return load_model(folder / "flow" / "model", "cpu")


def _of(cells: AnnData, contexts: Sequence[str]) -> AnnData:
    return cells[np.isin(cells.obs["cell_type"].to_numpy(str), list(contexts))].copy()


def _predict(model: Model, cells: AnnData, train: Sequence[str], context: str, seed: int) -> list[HeldOut]:
    """Predict every perturbation of a context from its control cells."""
    trained, back = model.read(_of(cells, train)), model.read(_of(cells, [context]))
    held = predict_held_out(model, trained, back, COLUMNS, seed=seed, contexts=["cell_type"])
    return [replace(one, label=f"{context}: {one.label}") for one in held if one.real.shape[0] >= 2 * MIN_CELLS]


def _score(model: Model, cells: AnnData, train: Sequence[str], held: list[HeldOut]) -> PerturbationScores:
    counts = model.read(_of(cells, train)).counts
    return find_protocol(PerturbationProtocol).evaluate(counts, held)


def _few(
    folder: Path, model: Model, cells: AnnData, train: Sequence[str], context: str, seed: int
) -> dict[str, PerturbationScores]:
    """Fine-tune on a few perturbed cells of a context, and train on them alone; score both on its other cells."""
    own = _of(cells, [context])
    label = own.obs["perturbation"].to_numpy(str)
    rng = np.random.default_rng([seed, 9])
    labels = rng.permutation(np.setdiff1d(label, ["control"]))
    seen = labels[: len(labels) // 2]
    control = label == "control"
    given = rng.permutation(np.flatnonzero(np.isin(label, seen)))[:FEW]
    taught = np.zeros(own.n_obs, bool)
    taught[given] = True
    taught[np.flatnonzero(control)[::2]] = True
    rest = own[~taught].copy()
    request = Request("perturb", "head", columns=COLUMNS)
    found = {}
    for what, parent in (("fine-tuned", folder / "flow" / "model"), ("alone", folder / "vae" / "model")):
        tuned = finetune(
            parent, own[taught].copy(), folder / what, request, overrides=[f"seed={seed}", *QUIET], say=lambda _: None
        )
        made = Model(tuned.model)
        trained = made.read(_of(cells, train))
        held = predict_held_out(made, trained, made.read(rest), COLUMNS, seed=seed, contexts=["cell_type"])
        among = {"+".join(sorted(name.split("+"))) for name in seen}
        for part, wanted in (("perturbations among them", True), ("others", False)):
            some = [one for one in held if (one.name in among) == wanted and one.real.shape[0] >= 2 * MIN_CELLS]
            try:
                found[f"{FEW} cells, {what}, {part}"] = _score(made, cells, train, some)
            except UserError:  # nothing is known of others
                continue
    return found


def _alike(parts: Sequence[PerturbationScores]) -> bool:
    return all(part.labels == parts[0].labels for part in parts)
