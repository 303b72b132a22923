"""``bgen bench representations``: which representation of a cell's genes helps, and when: vector, set, groups, network.

A VAE is trained with each encoder: the same decoder, the same steps, as many parameters. Cells that it has not seen are
then encoded from all of their counts, from a part of their molecules, and from a part of their genes, as a smaller
panel would have measured them. The negative log-likelihood is always that of all counts, each cell explained by one
posterior sample; the accuracy is that of a classifier of labels that was trained on latents of whole training cells.
A few training cells alone are tried, too.

What reads groups or a network stands beside its control, the same with genes shuffled; what is said of it is said
against that control, and of the others against the state vector. Tokens that look at one another (``mixed``) stand
beside those that do not, and those that know which set lies in which (``hierarchy``), or which regulator acts on which
(``relations``), beside tokens that look at one another without knowing it.

Axes: N cells, G genes, D latent size.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from bgen.bench.kept import RUN, Kept
from bgen.bench.quality.compared import Compared, Figures
from bgen.bench.runs import store_of, train_whole
from bgen.config.load import load_config
from bgen.config.vae import VAEConfig
from bgen.data.cells_in_memory import MemoryCells
from bgen.errors import UserError, nearest
from bgen.evaluate.metrics.classifiers import thinned
from bgen.evaluate.metrics.counts import variable_genes
from bgen.files import write_result
from bgen.models.vae.vae import VAE
from bgen.order.keys import hash_keys
from bgen.progress import Say
from bgen.tasks.load import load_model
from bgen.tasks.user_cells import read_input
from bgen.version import __version__

VECTOR = "state vector"
TEST = 0.2
"""Share of the cells that no training sees."""
AT_ONCE = 512
NEIGHBOURS = 15
KEPT = {"30 % counts": 0.3, "10 % counts": 0.1}
PANELS = {"50 % genes": 0.5, "20 % genes": 0.2}


@dataclass(frozen=True)
class Row:
    """One representation: its settings under ``vae``, and the row that it is judged against."""

    settings: Mapping[str, Any]
    against: str = VECTOR


def rows_of(sets: Path | None, network: Path | None) -> dict[str, Row]:
    """Return what is compared; groups and networks where their files are given."""
    gene_set: dict[str, Any] = {"name": "gene_set"}
    panel = {"share": 0.5, "most": 0.9}
    rows = {
        VECTOR: Row({}),
        "state vector, panels": Row({"panel": panel}),
        "set of molecules": Row({"encoder": gene_set}),
        "set of molecules, panels": Row({"encoder": gene_set, "panel": panel}, "state vector, panels"),
        "set of genes by log count": Row({"encoder": gene_set | {"weighting": "log"}}),
        "set of genes without counts": Row({"encoder": gene_set | {"weighting": "genes"}}),
        "Set Transformer": Row({"encoder": gene_set | {"weighting": "genes", "values": True, "token_blocks": 1}}),
        "DeepSets": Row({"encoder": gene_set | {"values": True, "attention": False, "tokens": 1}}),
        "ranks": Row({"encoder": {"name": "ranked"}}),
        "ranks, one random order": Row({"encoder": {"name": "ranked", "shuffled": True}}),
    }
    for name, key, file, related in (
        ("pathways", "groups", sets, "hierarchy"),
        ("regulators", "network", network, "relations"),
    ):
        if file is None:
            continue
        control = f"{name}, shuffled"
        for bias in ("soft", "hard"):
            given = {"file": str(file), "bias": bias}
            rows[f"{name}, {bias}"] = Row({"encoder": gene_set | {"tokens": 4, key: given}}, f"{control}, {bias}")
            shuffled = given | {"shuffled": True}
            rows[f"{control}, {bias}"] = Row({"encoder": gene_set | {"tokens": 4, key: shuffled}})
        mixed = gene_set | {"tokens": 4, "token_blocks": 1}
        rows[f"{name}, mixed"] = Row({"encoder": mixed | {key: {"file": str(file)}}}, f"{name}, soft")
        known = {"file": str(file), related: True}
        rows[f"{name}, {related}"] = Row({"encoder": mixed | {key: known}}, f"{name}, mixed")
    return rows


def bench_representations(
    file: Path,
    out: Path,
    *,
    label: str,
    genes: int = 2000,
    seeds: int = 3,
    steps: int = 800,
    few: int = 300,
    sets: Path | None = None,
    network: Path | None = None,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    resume: bool = False,
    say: Say,
) -> Compared:
    """Train and measure, and write ``representations.json``, a table (``.md``) and a picture (``.png``).

    Figures are kept in ``rows.jsonl`` as they are found, and a comparison that was stopped goes on from there.

    Parameters
    ----------
    label
        obs column of labels that a classifier finds again in the latents.
    genes
        Variable genes, chosen on cells that are trained on.
    few
        Training cells of a further training, of half as many steps; 0: none.
    sets, network
        Gene sets (.gmt) and a regulatory network (CSV), for the rows that read them.
    only
        Names of rows, beside those that they are judged against; none: all.
    overrides
        Of every training's configuration ``vae``.
    resume
        Go on in ``out``, with the same settings; rows may be others.

    Raises
    ------
    UserError
        If the file, the label or a row's name cannot be used.
    """
    cells = read_input(file)
    if label not in cells.obs:
        raise UserError(f"{file} has no obs column '{label}'.{nearest(label, cells.obs.columns)}")
    rows = _chosen(rows_of(sets, network), only)
    facts: dict[str, Any] = {"bgen": __version__, "data": file.name, "cells": cells.n_obs, "genes": genes}
    facts |= {"steps": steps, "few": few, "label": label, "overrides": list(overrides)}
    found = Kept(out, facts, resume=resume)
    for seed in range(seeds):
        left = {name: row for name, row in rows.items() if (name, seed) not in found}
        if not left:
            continue
        test = np.zeros(cells.n_obs, bool)
        test[np.random.default_rng([seed, 41]).permutation(cells.n_obs)[: int(TEST * cells.n_obs)]] = True
        counts = sparse.csr_matrix(cells.X)
        kept = np.sort(variable_genes(counts[~test], min(genes, cells.n_vars)))
        some = AnnData(counts[:, kept], obs=cells.obs[[label]], var=cells.var.iloc[kept], uns=_organism(cells))
        some = some[np.asarray(some.X.sum(1)).ravel() > 0]
        held = test[np.asarray(counts[:, kept].sum(1)).ravel() > 0]
        trainings = {"": some[~held]} | ({f"{few} cells": _few(some[~held], few, seed)} if few else {})
        stores = {name: store_of(part.copy(), out / RUN / (name or "all"), seed) for name, part in trainings.items()}
        for name, row in left.items():
            figures: Figures = {}
            for of, part in trainings.items():
                number = steps if not of else max(1, steps // 2)
                told = _measure(row, part, some[held], stores[of], out / RUN, label, seed, number, overrides)
                figures |= told if not of else {f"{key}, {of}": told[key] for key in ("NLL", "accuracy")}
            figures["ms"] = figures.pop("ms")
            found.add(name, seed, figures)
            say(f"{name}, split {seed}: NLL {figures['NLL']:,.1f}, accuracy {figures['accuracy']:.3f}")
        shutil.rmtree(out / RUN)
    note = "NLL: nats a cell, lower is better; accuracy: of labels, higher is better; ms: processor time of a training"
    compared = Compared(
        f"Representations of the genes: {file.name}",
        {name: row.against for name, row in rows.items()},
        found.runs(rows, seeds),
        facts | {"seeds": seeds},
        f"{note} over its steps.",
    )
    write_result(out / "representations.json", json.dumps(compared.as_json(), indent=1) + "\n")
    write_result(out / "representations.md", compared.markdown())
    compared.draw(out / "representations.png")
    return compared


def _chosen(rows: dict[str, Row], only: Sequence[str]) -> dict[str, Row]:
    """Return the rows that are asked for, with those that they are judged against, and those that these are."""
    for name in only:
        if name not in rows:
            raise UserError(f"--only: there is no row '{name}'.{nearest(name, rows)}")
    wanted, rest = {VECTOR}, list(only or rows)
    while rest:
        name = rest.pop()
        if name not in wanted:
            wanted.add(name)
            rest.append(rows[name].against)
    return {name: row for name, row in rows.items() if name in wanted}


def _organism(cells: AnnData) -> dict[str, Any]:
    return {key: value for key, value in cells.uns.items() if key == "organism"}


def _few(cells: AnnData, few: int, seed: int) -> AnnData:
    return cells[np.sort(np.random.default_rng([seed, 42]).permutation(cells.n_obs)[:few])]


def _measure(
    row: Row,
    train: AnnData,
    test: AnnData,
    store: Path,
    work: Path,
    label: str,
    seed: int,
    steps: int,
    overrides: Sequence[str],
) -> Figures:
    """Train with one representation and measure what its latents hold."""
    common = [
        f"data.store={store}",
        f"seed={seed}",
        f"train.steps={steps}",
        "track.mlflow=false",
        "track.progress=false",
    ]
    run = work / "vae"
    settings = _equal_size({**row.settings}, train.n_vars, overrides)
    given = [f"vae.{key}={json.dumps(value)}" for key, value in settings.items()]
    began = time.process_time()
    train_whole("vae", [*common, *given, f"out={run}", *overrides])
    spent = time.process_time() - began
    model = load_model(run / "model", "cpu")
    done = json.loads((run / "record.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    shutil.rmtree(run)
    vae = model.saved.vae
    of_train, of_test = (model.read(part.copy()).counts for part in (train, test))
    labels, true = (part.obs[label].to_numpy(str) for part in (train, test))
    probe = _probe(latent_means(vae, of_train), labels)
    rng = np.random.default_rng([seed, 43])
    shown = {"": of_test, **{name: thinned(of_test, share, rng) for name, share in KEPT.items()}}
    shown |= {name: _on_panel(of_test, share, rng) for name, share in PANELS.items()}
    figures: Figures = {}
    for name, seen in shown.items():
        after = f", {name}" if name else ""
        figures[f"NLL{after}"] = explained(vae, seen, of_test, seed)
        figures[f"accuracy{after}"] = float(np.mean(probe(latent_means(vae, seen)) == true))
    figures["kNN accuracy"] = _neighbours(latent_means(vae, of_train), labels, latent_means(vae, of_test), true)
    figures["ms"] = 1e3 * spent / max(int(done.get("step", steps)), 1)
    return figures


def _equal_size(settings: dict[str, Any], n_genes: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Give an encoder with a gene table rows so wide that it has about as many parameters as the state vector's."""
    encoder = settings.get("encoder")
    if encoder is None:
        return settings
    sizes = load_config("vae", overrides).vae.model_dump()

    def parameters(encoder: Mapping[str, Any]) -> int:
        with torch.device("meta"):
            vae = VAE(VAEConfig.model_validate({**sizes, "encoder": encoder}), n_genes, {})
        return sum(parameter.numel() for parameter in vae.encoder.parameters())

    target = parameters({"name": "state_vector"})
    widths = range(8, 257, 8)
    rows = min(widths, key=lambda width: abs(parameters({**encoder, "rows": width}) - target))
    return {**settings, "encoder": {**encoder, "rows": rows}}


@torch.no_grad()
def latent_means(vae: VAE, counts: sparse.csr_matrix) -> NDArray[np.float32]:
    """Return the means of the latent states ``[N, D]``."""
    cells = MemoryCells(counts, {})
    parts = [np.arange(start, min(start + AT_ONCE, len(cells))) for start in range(0, len(cells), AT_ONCE)]
    return np.concatenate([vae.encode(cells.batch(rows, hash_keys(0, rows)))[0].numpy() for rows in parts])


@torch.no_grad()
def explained(vae: VAE, seen: sparse.csr_matrix, counts: sparse.csr_matrix, seed: int) -> float:
    """Return the mean negative log-likelihood of ``counts [N, G]``, nats, where the encoder saw ``seen [N, G]``."""
    shown, whole, total = MemoryCells(seen, {}), MemoryCells(counts, {}), 0.0
    for start in range(0, len(whole), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(whole)))
        keys = hash_keys(seed, rows)
        batch = whole.batch(rows, keys)
        mean, logvar = vae.encode(shown.batch(rows, keys))
        z = vae.posterior_sample(mean, logvar, batch.keys)
        total -= float(vae.decode(z, batch.library, batch.obs).log_prob_sparse(batch).sum())
    return total / len(whole)


def _on_panel(counts: sparse.csr_matrix, share: float, rng: np.random.Generator) -> sparse.csr_matrix:
    """Return the counts of a share of the genes; the others were not measured."""
    panel = rng.permutation(counts.shape[1]) < share * counts.shape[1]
    kept = sparse.csr_matrix(counts @ sparse.diags(panel.astype(counts.dtype)))
    kept.eliminate_zeros()
    return kept


def _probe(latents: NDArray[np.float32], labels: NDArray[np.str_]) -> Callable[[NDArray[np.float32]], NDArray[np.str_]]:
    """Return what tells labels from latents, trained on these."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(latents, labels)
    return lambda others: np.asarray(found.predict(others))


def _neighbours(
    latents: NDArray[np.float32], labels: NDArray[np.str_], others: NDArray[np.float32], true: NDArray[np.str_]
) -> float:
    """Return the accuracy of the label that most nearest training cells have."""
    from sklearn.neighbors import KNeighborsClassifier

    found = KNeighborsClassifier(min(NEIGHBOURS, len(latents))).fit(latents, labels)
    return float(found.score(others, true))
