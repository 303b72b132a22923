"""``bgen bench representations --data-types``: which architecture suits which structure of data, with known truth.

Of cells that are made of known pathways, or of known regulators, the first table is made (representations.py). Two
further structures are simulated, and the same flow learns them with different mixers of about as many parameters. What
a network says is the mean of a few draws, and its error is the share of the variance that is left.

- **A course in time**: damped oscillators, each with a frequency of its own, so that only its past tells its future.
  The networks learn courses of 12 time points, and are asked for courses of 12 and of 24, with even and with uneven
  gaps. Beside them stands the first of them on courses whose time points were shuffled: where order says nothing.
- **A population**: what cells answer depends on how many others of their population stand aside (a *crowd*), or on
  where each cell stands itself. No cell knows the first, and no other cell is needed for the second.

Then, **perturbations** that training never saw, in a simulated screen: known by how their genes vary with
others, by vectors of what they drive (which is the truth), and by these vectors with the names shuffled.

Last, **sequences**: promoters of genes in which the order of two motifs decides where a gene is expressed
(:mod:`bgen.bench.sequences.dna`).

Axes: B courses or populations, T time points, N cells per time point, D dimensions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bgen.bench.kept import RUN, Kept, is_begun
from bgen.bench.quality.compared import Compared, Figures
from bgen.bench.quality.perturb import TARGETS, Training, splits, train_flow, train_vae
from bgen.bench.quality.representations import bench_representations
from bgen.bench.sequences.dna import bench_dna
from bgen.config.flow import FlowConfig, PatternsConfig, SampleConfig
from bgen.config.sequences import SequenceConfig, SequenceTraining
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.errors import UserError, nearest
from bgen.evaluate.protocols.perturbation_scores import MODEL
from bgen.evaluate.registry import PerturbationProtocol, find_protocol
from bgen.files import require_new_folder, write_h5ad, write_result
from bgen.models.backbones.size import with_parameters
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.models.measured_latents import MeasuredLatents
from bgen.order.keys import hash_keys
from bgen.progress import Say
from bgen.tasks.perturb.held_out import predict_held_out
from bgen.tasks.perturb.screen import Columns
from bgen.version import __version__
from data_tools.simulate.programmes import simulate_programmes, write_known
from data_tools.simulate.screens import simulate_screens, write_drives

PROGRAMMES_KNOWN = {"pathways": "gmt", "regulators": "csv"}
"""Simulated cells of known programmes to the format in which these are known."""

PROMOTERS = {"genes": 600, "length": 40, "cells": 300}
"""Sizes of simulated promoters."""

_OF_SCREENS = ("pearson", "explained")
"""Figures that are told of predicted perturbations."""

PARAMETERS = 40_000
DRAWS, SOLVER = 4, SampleConfig(steps=4)
LENGTH, AHEAD = 12, 4
"""Time points of a course that is trained on, and how far ahead the farthest forecast is."""
TESTED = 128
"""Courses or populations that are asked for."""
_NEW = 1 << 40
"""Added to the numbers of what is asked for, which training never sees."""

Gaps = Literal["even", "uneven"]
Answer = Literal["crowd", "own"]
Cells = tuple[Tensor, Tensor]
"""Cells and their times."""

COURSES: dict[str, dict[str, Any]] = {
    "no mixing over time": {"name": "mlp"},
    "mamba2": {"name": "ssm", "time": {"mixer": "mamba2", "tracked": True}},
    "s4d": {"name": "ssm", "time": {"mixer": "s4d", "tracked": True}},
    "attention": {"name": "ssm", "time": {"mixer": "attention", "tracked": True}},
}
SHUFFLED = "mamba2, times shuffled"
POPULATIONS: dict[str, dict[str, Any]] = {
    "no mixing over cells": {"name": "mlp"},
    "attention": {"name": "hybrid", "pattern": ["cells", "none"]},
    "set attention": {
        "name": "hybrid",
        "pattern": ["cells", "none"],
        "cells": {"mixer": "set_attention", "inducing": 8},
    },
}
_COMMON: dict[str, Any] = {
    "layers": 2,
    "attention": {"heads": 2},
    "mamba2": {"head_width": 8, "state": 16},
}


def bench_data_types(
    out: Path, *, seeds: int = 3, steps: int | None = None, only: Sequence[str] = (), resume: bool = False, say: Say
) -> dict[str, Compared]:
    """Simulate, train and measure, and write ``data_types.json``, tables (``.md``) and a picture (``.png``) of each.

    They are written after every table; the figures of a table are kept in its folder as they are found.

    Parameters
    ----------
    steps
        Of every training, instead of its own.
    only
        Names of tables (:data:`TABLES`); none: all.
    resume
        Go on in ``out``, with the same settings; tables may be others.

    Raises
    ------
    UserError
        If a table's name is unknown, ``out`` cannot be used, or was measured with other settings.
    """
    for name in only:
        if name not in TABLES:
            raise UserError(f"--only: there is no table '{name}'.{nearest(name, TABLES)}")
    if not resume:
        require_new_folder(out)
    elif not out.is_dir():
        raise UserError(f"--resume: there is no folder {out}.")
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, table in TABLES.items():
        if only and name not in only:
            continue
        given = {} if steps is None else {"steps": steps}
        begun = resume and is_begun(out / name)
        found[name] = table(out / name, seeds=seeds, resume=begun, say=say, **given)
        told = {name: one.as_json() for name, one in found.items()}
        write_result(out / "data_types.json", json.dumps(told, indent=1) + "\n")
        write_result(out / "data_types.md", "\n".join(one.markdown() for one in found.values()))
        found[name].draw(out / f"{name}.png")
    return found


def bench_programmes(
    preset: str, folder: Path, *, seeds: int = 3, steps: int = 400, resume: bool = False, say: Say
) -> Compared:
    """Compare what reads the programmes that cells are made of with what does not; ``preset``: how they are known."""
    known = PROGRAMMES_KNOWN[preset]
    cells = simulate_programmes(preset)
    file, named = (folder.with_name(f"{preset}{ending}") for ending in (".h5ad", f".{known}"))
    if not file.is_file():
        write_h5ad(cells, file)
    write_known(cells, named)
    return bench_representations(
        file,
        folder,
        label="cell_type",
        genes=cells.n_vars,
        seeds=seeds,
        steps=steps,
        few=200,
        only=["state vector, panels", "set of molecules", f"{preset}, soft", f"{preset}, hard"],
        sets=named if known == "gmt" else None,
        network=named if known == "csv" else None,
        resume=resume,
        say=say,
    )


def bench_courses(folder: Path, *, seeds: int = 3, steps: int = 400, resume: bool = False, say: Say) -> Compared:
    """Compare mixers over time on courses of oscillators.

    The error is told of a missing point in the middle (``missing``), of the next after all others (``next``) and of the
    last of four that are forecast at once (``4 ahead``).
    """
    facts = {"bgen": __version__, "steps": steps}
    kept = Kept(folder, facts, resume=resume)
    rows = [*COURSES, SHUFFLED]
    for seed, name in product(range(seeds), rows):
        if (name, seed) in kept:
            continue
        shuffled = name == SHUFFLED
        flow = _train(COURSES["mamba2" if shuffled else name], seed, steps, shuffled=shuffled)
        figures: Figures = {}
        for gaps in ("even", "uneven"):
            for times in (LENGTH, 2 * LENGTH):
                cells, time = courses(TESTED, times, gaps, seed, _NEW, shuffled=shuffled)
                places = {"missing": [times // 2], "next": [-1], "4 ahead": list(range(-AHEAD, 0))}
                for asked, unseen in places.items():
                    left = _left(flow, cells, time, unseen, seed)
                    figures[f"error of {asked}, {times} {gaps}"] = left
        kept.add(name, seed, figures)
        say(f"{name}, seed {seed}: " + ", ".join(f"{key[9:]} {value:.3f}" for key, value in figures.items()))
    against = dict.fromkeys(COURSES, next(iter(COURSES))) | {SHUFFLED: "mamba2"}
    note = f"Share of the variance left, trained at {LENGTH} time points; {PARAMETERS:,} parameters."
    return Compared("Courses in time: what mixes over time", against, kept.runs(rows, seeds), facts, note)


def bench_populations(folder: Path, *, seeds: int = 3, steps: int = 300, resume: bool = False, say: Say) -> Compared:
    """Compare mixers over cells where the answer is the population's, and where it is each cell's own."""
    facts = {"bgen": __version__, "steps": steps}
    kept = Kept(folder, facts, resume=resume)
    for seed, (name, backbone) in product(range(seeds), POPULATIONS.items()):
        if (name, seed) in kept:
            continue
        figures: Figures = {}
        for answer in ("crowd", "own"):
            flow = _trained_flow(backbone, seed, steps, partial(populations, 16, answer, seed))
            figures[f"error, {answer}"] = _left(flow, *populations(TESTED, answer, seed, _NEW), [1], seed, 1)
        kept.add(name, seed, figures)
        say(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    against = dict.fromkeys(POPULATIONS, next(iter(POPULATIONS)))
    note = f"Share of the variance of the mean answers left; {PARAMETERS:,} parameters."
    return Compared("Populations: what mixes over cells", against, kept.runs(POPULATIONS, seeds), facts, note)


def bench_unseen(
    folder: Path,
    *,
    seeds: int = 3,
    steps: int = 400,
    cells: int = 12_000,
    genes: int = 300,
    resume: bool = False,
    say: Say,
) -> Compared:
    """Compare what is known of six perturbations that training never saw; ``steps``: of the VAE, the flow has half."""
    protocol = find_protocol(PerturbationProtocol)
    facts = {"bgen": __version__, "steps": steps, "cells": cells, "genes": genes}
    kept = Kept(folder, facts, resume=resume)
    against = {"co-expression": "co-expression", "known vectors": "known vectors, shuffled"}
    against |= {"known vectors, shuffled": "co-expression"}
    for seed in range(seeds):
        left = [name for name in against if (name, seed) not in kept]
        if not left:
            continue
        work = folder / RUN
        work.mkdir()
        screen = simulate_screens("lines", cells=cells, genes=genes, seed=seed)
        columns = Columns("perturbation", "control", strata=["cell_type"]).resolved(screen)
        (split,) = splits(screen, columns, TARGETS, "6", seed)
        known, shuffled = work / "known.csv", work / "shuffled.csv"
        write_drives(screen, known)
        table = pd.read_csv(known, index_col=0)
        order = np.random.default_rng([seed, 8]).permutation(len(table))
        table.set_index(table.index[order]).to_csv(shuffled, index_label="name")
        vae = train_vae(split.train, Training(steps), work, seed)
        told = {
            "co-expression": "components: 16",
            "known vectors": f"components: 0, vectors: [{known}]",
            "known vectors, shuffled": f"components: 0, vectors: [{shuffled}]",
        }
        for name in left:
            training = Training(steps, [f"flow.members={{column: perturbation, {told[name]}}}"])
            model = train_flow(vae, split.train, columns, training, work / "flow", seed)
            train, back = model.read(split.train), model.read(split.back)
            scores = protocol.evaluate(train.counts, predict_held_out(model, train, back, columns, seed=seed))
            figures = {key: scores.mean(MODEL, key) for key in _OF_SCREENS}
            kept.add(name, seed, figures)
            say(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
            shutil.rmtree(work / "flow")
        shutil.rmtree(work)
    note = "Figures of perturbation-v4 over six unseen targets."
    title = "Perturbations that training never saw: what is known of them"
    return Compared(title, against, kept.runs(against, seeds), facts, note)


def bench_sequences(folder: Path, *, seeds: int = 3, steps: int = 50, resume: bool = False, say: Say) -> Compared:
    """Compare sequence models on promoters in which the order of two motifs decides; ``steps``: epochs of each."""
    training = SequenceTraining(epochs=steps, shift=0)
    (found,) = bench_dna(
        None,
        None,
        folder,
        by=[],
        seeds=seeds,
        config=SequenceConfig(pool=4),
        training=training,
        simulated=PROMOTERS,
        resume=resume,
        say=say,
    )
    return found


TABLES: dict[str, Callable[..., Compared]] = {
    **{preset: partial(bench_programmes, preset) for preset in PROGRAMMES_KNOWN},
    "courses": bench_courses,
    "populations": bench_populations,
    "perturbations": bench_unseen,
    "sequences": bench_sequences,
}
"""Tables by name: each takes its folder, ``seeds``, ``steps``, ``resume`` and ``say``."""


def courses(n: int, times: int, gaps: Gaps, seed: int, number: int, *, shuffled: bool = False) -> Cells:
    """Return cells ``[n, T, 1, D = 4]`` of damped oscillators, and their times ``[n, T]``, the same for each number.

    Two oscillators in each course, seen from two sides each; gaps are 1, or uniform between .3 and 1.7. ``shuffled``:
    the same points in another order, each course in its own.
    """
    rng = np.random.default_rng([seed, number])
    gap = np.ones((n, times)) if gaps == "even" else rng.uniform(0.3, 1.7, (n, times))
    time = np.cumsum(gap, axis=1) - gap[:, :1]
    frequency, phase = rng.uniform([0.35, 0.8], [0.6, 1.2], (n, 2)), rng.uniform(0, 2 * np.pi, (n, 2))
    wave = np.exp(1j * (frequency[:, None] * time[..., None] + phase[:, None]) - 0.03 * time[..., None])
    cells = np.concatenate([wave.real, wave.imag], axis=-1) * rng.uniform(0.8, 1.6, (n, 1, 1))
    cells += 0.05 * rng.standard_normal(cells.shape)
    if shuffled:
        cells = np.take_along_axis(cells, rng.permuted(np.tile(np.arange(times), (n, 1)), axis=1)[..., None], axis=1)
    return torch.from_numpy(cells).float()[:, :, None], torch.from_numpy(time).float()


def populations(n: int, answer: Answer, seed: int, number: int) -> Cells:
    """Return control and perturbed cells ``[n, T = 2, N = 32, D = 2]`` and times 0 and 1; the same for the same number.

    A share of the cells stands aside in the first dimension, on either side, so that the mean does not show it. The
    second dimension moves by twice that share (``crowd``), or in those cells that stand aside alone (``own``), which is
    the same on average. Those stand so far aside that the pairs at least cost are the true ones.
    """
    rng, N = np.random.default_rng([seed, number, 1]), 32
    share = rng.random(n)
    aside = np.arange(N) < np.round(share[:, None, None] * N)
    cells = 0.3 * rng.standard_normal((n, 2, N, 2))
    cells[..., 0] += rng.choice([-3.0, 3.0], (n, 1, N)) * aside
    cells[:, 1, :, 1] += 2 * (share[:, None] if answer == "crowd" else aside[:, 0])
    return torch.from_numpy(cells).float(), torch.arange(2.0).expand(n, 2)


def _train(backbone: Mapping[str, Any], seed: int, steps: int, *, shuffled: bool) -> LatentFlow:
    def draw(step: int) -> Cells:
        return courses(32, LENGTH, "even" if step % 2 else "uneven", seed, step, shuffled=shuffled)

    return _trained_flow(backbone, seed, steps, draw)


def _trained_flow(backbone: Mapping[str, Any], seed: int, steps: int, draw: Callable[[int], Cells]) -> LatentFlow:
    """Train the flow of courses and screens on what ``draw`` returns for a step."""
    torch.manual_seed(seed)
    cells, _ = draw(0)
    screen = cells.shape[1] == 2
    patterns = {"noise": 0, "perturb": 1} if screen else {"noise": 0, "forecast": 2, "interpolate": 1, "perturb": 0}
    config = FlowConfig(
        backbone=with_parameters(cells.shape[-1], {**_COMMON, **backbone}, PARAMETERS, 4),
        source="neighbours",
        patterns=PatternsConfig.model_validate({"forecast": 0, "interpolate": 0, **patterns}),
    )
    flow = LatentFlow(config, MeasuredLatents(torch.zeros(1, cells.shape[-1])), {}, {}).train()
    optimizer = torch.optim.AdamW([p for p in flow.parameters() if p.requires_grad], 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        loss = flow(_batch(*draw(step), seed, step, screen=screen))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return flow.eval()


def _batch(cells: Tensor, time: Tensor, seed: int, step: int, *, screen: bool) -> TrajectoryBatch:
    n = cells.shape[:3].numel()
    keys = torch.from_numpy(hash_keys(seed, step, np.arange(n)).view(np.int64))
    empty = CellBatch(torch.zeros(n + 1, dtype=torch.int64), torch.zeros(0).int(), torch.zeros(0), 1, keys, keys)
    control = torch.tensor([screen] + [False] * (cells.shape[1] - 1)).expand(cells.shape[:2])
    found = TrajectoryBatch.of(empty, torch.ones(cells.shape[:3], dtype=torch.bool), time, control)
    found.whitened = cells.reshape(n, -1)
    return found


def _left(flow: LatentFlow, cells: Tensor, time: Tensor, unseen: list[int], seed: int, first: int = 0) -> float:
    """Return the share of the variance of means over cells that is left at the last of the unseen time points.

    Dimensions before the ``first`` do not count.
    """
    asked = unseen[-1]
    seen = torch.ones(cells.shape[:2], dtype=torch.bool)
    seen[:, unseen] = False
    places = Places(torch.ones(cells.shape[:3], dtype=torch.bool), time, seen, cells)
    made = torch.zeros_like(cells[:, asked].mean(1))
    for draw in range(DRAWS):
        keys = torch.from_numpy(hash_keys(seed, 9, draw, np.arange(cells.shape[:3].numel())).view(np.int64))
        made += flow.sample_trajectories({}, keys.view(cells.shape[:3]), SOLVER, places)[:, asked].mean(1) / DRAWS
    made, true = made[:, first:], cells[:, asked].mean(1)[:, first:]
    return float((made - true).square().sum() / (true - true.mean(0)).square().sum())
