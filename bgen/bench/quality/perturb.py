"""``bgen bench perturb``: leave parts of a screen out, predict them, and compare by the protocol ``perturbation-v4``.

What is left out, each in its own trainings:

- ``group:COLUMN``: the cells of each value of an obs column in turn, such as a replicate; their perturbations are
  predicted from their control cells.
- ``contexts:COLUMN``: the perturbed cells of each value of an obs column in turn, such as a cell type; its control
  cells are trained on, too, as those of a user would be, and are predicted from.
- ``targets:N``: N random single perturbations at a time, of which the model only knows the target gene.
- ``combinations:N``: N random combinations whose members are trained on.
- ``doses``: each dose between others of the same perturbation in turn, scored together. All control cells are trained
  on and predicted from, as a user would do.

Where control cells are trained on and predicted from (contexts and doses), they are not halved: no control cell is ever
predicted, and halving few of them twice would add noise that no row can beat.

Apart from that, VAE and flow see nothing of what is left out. The trainings of further seeds have other random choices,
and are averaged where the same is left out; intervals are over perturbations.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from bgen.bench.runs import store_of, train_whole
from bgen.config.finetune import FinetuneConfig
from bgen.errors import UserError, nearest
from bgen.evaluate.protocols.cell_eval import Figures, average, cell_eval_figures, require_cell_eval
from bgen.evaluate.protocols.perturbation import HeldOut
from bgen.evaluate.protocols.perturbation_scores import PerturbationScores, join
from bgen.evaluate.registry import PerturbationProtocol, find_protocol
from bgen.files import require_new_folder
from bgen.genes.sets import GeneSets, read_gene_sets
from bgen.genes.table import find_genes
from bgen.progress import Say
from bgen.tasks.columns import text_column
from bgen.tasks.finetune.finetune import Request, finetune
from bgen.tasks.load import Model
from bgen.tasks.perturb.held_out import predict_held_out, split_screen
from bgen.tasks.perturb.keys import DOSE, ScreenKeys, screen_keys
from bgen.tasks.perturb.screen import LEAST_CONTROLS, Columns, require_controls
from bgen.tasks.user_cells import read_input
from bgen.version import __version__
from data_tools.check.labels import JOIN, WHOLE

GROUP, CONTEXTS, TARGETS, COMBINATIONS, DOSES = "group", "contexts", "targets", "combinations", "doses"
WAYS = (f"{GROUP}:COLUMN", f"{CONTEXTS}:COLUMN", f"{TARGETS}:N", f"{COMBINATIONS}:N", DOSES)
LEAST_CELLS = 40
"""Of a perturbation that is predicted, so that both halves of its cells tell something."""


@dataclass(frozen=True)
class Split:
    """Cells to train on, and cells that are kept back: of held-out perturbations, and control cells."""

    name: str
    train: AnnData
    back: AnnData


OF_FLOW = FinetuneConfig.model_fields.keys()
"""Sections of settings that the flow's training has; the VAE's has others too."""


@dataclass(frozen=True)
class Training:
    """How every model is trained: steps of the VAE (the flow has half as many), and overrides for both."""

    steps: int
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Found:
    """Scores of one way to leave out, and cell-eval's figures if they were asked for."""

    scores: PerturbationScores
    cell_eval: Figures | None


def bench_perturb(
    path: Path,
    columns: Columns,
    leave: Sequence[str],
    out: Path,
    training: Training,
    *,
    seeds: int,
    cell_eval: bool,
    say: Say,
    sets: Path | None = None,
) -> dict[str, Found]:
    """Train and score every split, and write ``perturb.json`` and a page for each way to leave out.

    Parameters
    ----------
    leave
        Each as in :data:`WAYS`.
    cell_eval
        Compute the figures of that library, too.
    sets
        Gene sets (.gmt) for the baseline of unseen targets that needs them.

    Returns
    -------
    dict
        What was left out to what was found.

    Raises
    ------
    UserError
        If a file, a column or what is to be left out is not there, or cell-eval is not installed.
    """
    if cell_eval:
        require_cell_eval()
    gene_sets = None if sets is None else read_gene_sets(sets)
    cells = read_input(path)
    columns = columns.resolved(cells)
    require_controls(columns.labels(cells), columns)
    for sentence in columns.sentences(cells):
        say(sentence)
    planned = {text: [splits(cells, columns, *_read(text), seed) for seed in range(seeds)] for text in leave}
    require_new_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    protocol = find_protocol(PerturbationProtocol)
    found: dict[str, Found] = {}
    for text, of_seeds in planned.items():
        runs, figures = [], []
        for seed, parts in enumerate(of_seeds):
            predicted = _predict(parts, columns, training, out / "run", seed, text, gene_sets)
            runs.append(join([protocol.evaluate(counts, held) for counts, held in predicted], "perturbations"))
            figures += [cell_eval_figures(held, seed=seed) for _, held in predicted if cell_eval]
            say(f"{text}, seed {seed}: {runs[-1].headline()}")
        alike = all(run.labels == runs[0].labels for run in runs)
        scores = join(runs, "seeds" if alike else "perturbations")
        found[text] = Found(scores, average(figures) if figures else None)
        page = out / f"{text.replace(':', '-')}.html"
        facts = {"data": path.name, "left out": text, "seeds": seeds, "steps": training.steps, "bgen": __version__}
        protocol.report(page, scores, provenance=facts)
    left_out = {text: {**one.scores.as_json(), "cell_eval": one.cell_eval} for text, one in found.items()}
    told = {"data": path.name, "seeds": seeds, "left_out": left_out}
    (out / "perturb.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return found


def splits(cells: AnnData, columns: Columns, way: str, what: str, seed: int) -> list[Split]:
    """Return the splits of one way to leave out; ``what`` is its column or number."""
    keys = screen_keys(cells, columns)
    separator = columns.grammar.separator

    def joined(names: tuple[str, ...]) -> str:
        return (JOIN if separator == WHOLE else separator).join(names)

    sizes = {key: len(rows) for key, rows in keys.perturbed().items()}
    large = sorted((key for key, size in sizes.items() if size >= LEAST_CELLS), key=str)
    if way in (GROUP, CONTEXTS):
        return _groups(cells, columns, keys, what, shared_controls=way == CONTEXTS)
    if way == DOSES:
        doses = {name: sorted(key[1] for key in large if key[0] == name and key[1]) for name, _ in large}
        chosen = [joined(name) + f"{DOSE}{dose:g}" for name in doses for dose in doses[name][1:-1]]
        if not chosen:
            raise UserError(
                f"--leave {DOSES}: no perturbation has three doses of at least {LEAST_CELLS} cells; --dose names their"
                " obs column."
            )
        return [Split(label, *split_screen(cells, columns, [label], seed, shared_controls=True)) for label in chosen]
    able: list[tuple[str, ...]] = []
    if way == TARGETS:
        symbols = cells.var.get("symbol", cells.var_names)
        genes = pd.DataFrame({"id": cells.var_names, "symbol": np.asarray(symbols)})
        able += [key[0] for key in large if len(key[0]) == 1 and find_genes(genes, key[0])[0] >= 0]
    else:
        able += [key[0] for key in large if len(key[0]) > 1 and all(((part,), key[1]) in sizes for part in key[0])]
    names = list(dict.fromkeys(joined(names) for names in able))
    if len(names) <= int(what):
        raise UserError(f"--leave {way}:{what}: there are only {len(names)} that could be left out.")
    chosen = sorted(np.random.default_rng([seed, 6]).permutation(names)[: int(what)].tolist())
    return [Split(", ".join(chosen), *split_screen(cells, columns, chosen, seed))]


def _groups(cells: AnnData, columns: Columns, keys: ScreenKeys, column: str, *, shared_controls: bool) -> list[Split]:
    group = text_column(cells, column)
    control = keys.where(lambda key: key == columns.control_key)
    perturbed = keys.where(lambda key: bool(key[0]))
    made = []
    for value in np.unique(group[group != ""]):
        here = group == value
        inside, outside = (np.bincount(keys.number[rows], minlength=len(keys.distinct)) for rows in (here, ~here))
        known = perturbed & ((outside > 0) & (inside >= LEAST_CELLS))[keys.number]
        back = here & (known | control)
        if min((here & control).sum(), (~here & control).sum()) >= LEAST_CONTROLS and (back & ~control).any():
            train = ~here | control if shared_controls else ~here
            made.append(Split(str(value), cells[train].copy(), cells[back].copy()))
    if len(made) < 2:
        way = CONTEXTS if shared_controls else GROUP
        raise UserError(
            f"--leave {way}:{column}: two values of obs['{column}'] with {LEAST_CONTROLS} control cells and"
            f" perturbations of {LEAST_CELLS} cells are needed; there are {len(made)}."
        )
    return made


def _predict(
    parts: Sequence[Split],
    columns: Columns,
    training: Training,
    folder: Path,
    seed: int,
    text: str,
    gene_sets: GeneSets | None,
) -> list[tuple[sp.csr_matrix, list[HeldOut]]]:
    """Train on each split and predict; return the counts trained on, and what is to be scored by itself or together.

    ``text``: what is left out. Doses share their controls, and are scored together.
    """
    way, what = _read(text)
    together, contexts = way == DOSES, [what] if way in (GROUP, CONTEXTS) else None
    shared = way in (CONTEXTS, DOSES)
    made: list[tuple[sp.csr_matrix, list[HeldOut]]] = []
    for part in parts:
        model = _train(part.train, columns, training, folder, seed)
        train, back = model.read(part.train), model.read(part.back)
        held = predict_held_out(
            model, train, back, columns, seed=seed, shared_controls=shared, contexts=contexts, gene_sets=gene_sets
        )
        if not together and len(parts) > 1:
            held = [replace(one, label=f"{part.name}: {one.label}") for one in held]
        made.append((train.counts, held))
        shutil.rmtree(folder)
    if together:
        return [(made[0][0], [one for _, held in made for one in held])]
    return made


def _train(cells: AnnData, columns: Columns, training: Training, folder: Path, seed: int) -> Model:
    """Train a VAE, then the perturbation flow on it."""
    return train_flow(train_vae(cells, training, folder, seed), cells, columns, training, folder / "flow", seed)


def train_vae(cells: AnnData, training: Training, folder: Path, seed: int) -> Path:
    """Train a VAE on cells, whose columns do not become conditions; return its model directory."""
    plain = AnnData(cells.X, obs=pd.DataFrame(index=cells.obs_names), var=cells.var)
    plain.uns = {name: cells.uns[name] for name in ("organism",) if name in cells.uns}
    store = store_of(plain, folder / "data", seed)
    steps = [f"train.steps={training.steps}", "train.eval_every=100"]
    train_whole("vae", [f"data.store={store}", f"out={folder / 'vae'}", *steps, *_overrides(training, seed)])
    return folder / "vae" / "model"


def train_flow(vae: Path, cells: AnnData, columns: Columns, training: Training, folder: Path, seed: int) -> Model:
    """Train the perturbation flow on a VAE, with those of the overrides that it has."""
    request = Request("perturb", "head", columns=columns)
    of_flow = [
        override for override in _overrides(training, seed) if override.partition(".")[0].partition("=")[0] in OF_FLOW
    ]
    steps = [f"train.steps={max(1, training.steps // 2)}"]
    tuned = finetune(vae, cells, folder, request, overrides=[*steps, *of_flow], say=lambda _: None)
    return Model(tuned.model)


def _overrides(training: Training, seed: int) -> list[str]:
    return [*training.overrides, f"seed={seed}", "track.mlflow=false", "track.progress=false"]


def _read(text: str) -> tuple[str, str]:
    """Return the way to leave out and its column or number."""
    way, sign, what = text.partition(":")
    fits = {
        GROUP: bool(what),
        CONTEXTS: bool(what),
        TARGETS: what.isdigit(),
        COMBINATIONS: what.isdigit(),
        DOSES: not sign,
    }
    if not fits.get(way, False) or what == "0":
        raise UserError(f"--leave {text}: write {', '.join(WAYS[:-1])} or {WAYS[-1]}.{nearest(way, list(fits))}")
    return way, what
