"""The model card: what the model is, was trained on, how good it is, and what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bgen.hub.about import About, Extension, HeldOutScores
from bgen.names import in_code, in_markdown

_ROWS = ("model", "baseline", "ceiling")
_KINDS = {
    "flow": ("latent rectified flow on a VAE", "cells = model.generate(1000)  # AnnData of integer counts"),
    "vae": ("variational autoencoder", "model.embed(adata)  # adds obsm['X_bgen']"),
    "annotator": ("classifier of cells on a VAE", "model.annotate(adata)  # adds the label and its probability to obs"),
    "perturbation": (
        "flow from control to perturbed cells on a VAE",
        'cells = model.perturb(controls, "GENE")  # AnnData of integer counts',
    ),
}
_ON_LOG_COUNTS = {
    "flow": "rectified flow on the log counts of single cells",
    "perturbation": "flow from control to perturbed cells on their log counts",
}
"""What a flow without a VAE is."""


def model_card(
    config: Mapping[str, Any], about: About, preprocessing: Mapping[str, Any], metrics: Mapping[str, Any] | None
) -> str:
    """Return the README.md of a model directory as Markdown with the usual YAML head."""
    columns = preprocessing["columns"]
    asked = config.get("conditions", [])
    kind = "perturbation" if config.get("sets") else config["kind"]
    what, use = _KINDS[kind]
    if vae := config.get("vae"):
        what += f" of single-cell counts ({vae['likelihood'].upper()} likelihood)"
    else:
        what = _ON_LOG_COUNTS[kind]
    lines = [
        "---",
        "library_name: bgen",
        "tags: [single-cell, gene-expression, generative]",
        "---",
        f"# {in_markdown(about.name)}",
        "",
        f"A {what}, {config['n_genes']:,} genes, organism: {in_markdown(about.organism)}.",
        "",
        "## Use",
        "",
        "```python",
        "import bgen",
        "",
        'model = bgen.load("this/directory")',
        use,
        "```",
        "",
        "## Trained on",
        "",
        f"- {about.cells:,} cells of {in_markdown(', '.join(about.sources) or 'an unnamed source')}",
    ]
    if (run := about.training) is not None:
        lines.append(
            f"- store `{in_code(run.store[:16])}`, split `{in_code(run.split)}`, {run.steps:,} steps, seed {run.seed}"
        )
    if (tuned := about.finetuning) is not None:
        name, weights = in_markdown(tuned.parent.name), in_code(tuned.parent.fingerprint[:16])
        task, mode = in_markdown(tuned.task), in_markdown(tuned.mode)
        lines.append(f"- fine-tuned from **{name}** (weights `{weights}`): task {task}, mode {mode}")
    if about.extension is not None:
        lines += _extended(about.extension)
    if about.annotation is not None:
        lines += _listed("Labels", about.annotation.labels)
    if about.perturbation is not None:
        lines += _listed("Perturbations", about.perturbation.perturbations)
    if asked:
        lines += ["", "## What generation can be asked for", ""]
        for name in asked:
            info = columns[name]
            values = in_markdown(", ".join(info["categories"][:20])) + (", ..." if len(info["categories"]) > 20 else "")
            described = values if info["kind"] == "category" else f"a number; mean {info['mean']:.4g} in training"
            role = f" ({in_markdown(info['role'])})" if info["role"] != name else ""
            lines.append(f"- `{in_code(name)}`{role}: {described}")
    if config["covariates"]:
        lines += ["", f"Covariates of encoder and decoder: {in_markdown(', '.join(config['covariates']))}."]
    lines += ["", "## How good it is", ""]
    if about.perturbation is not None and about.perturbation.held_out is not None:
        lines += held_out_lines(about.perturbation.held_out)
    elif metrics is not None:
        lines += _scores(metrics)
    else:
        advice = "`bgen finetune --hold-out`" if config.get("sets") else "`bgen evaluate`"
        lines.append(f"Not evaluated yet: {advice}.")
    lines += [
        "",
        "## Limits",
        "",
        "Generated cells follow the training data, its biases included. They are not measurements and must not be used"
        " as such; the training cells are not anonymised by the model.",
        "",
    ]
    return "\n".join(lines)


def _extended(added: Extension) -> list[str]:
    """Return what is said of genes that no training has seen."""
    ways = in_markdown(", ".join(f"{number:,} {way}" for way, number in added.ways.items()))
    return [
        f"- {added.genes:,} genes were added to **{in_markdown(added.parent.name)}** (weights"
        f" `{in_code(added.parent.fingerprint[:16])}`) without training, by their vectors ({ways}); `genes.csv` and"
        " what the model makes mark them: `source` is `vector`. How well such genes are known: of"
        f" {added.trained_genes:,} trained genes with a vector, left out a fifth at a time, vectors tell"
        f" {added.level_r2:.0%} of the variance of their levels (R2 of the log mean; 0: no more than the mean of all"
        " genes). How well their differences between cells are told was not measured: `bgen bench genes` does that."
    ]


def _listed(title: str, names: list[str]) -> list[str]:
    return ["", f"{title}: {in_markdown(', '.join(names[:50]))}{', ...' if len(names) > 50 else ''}."]


def held_out_lines(scores: HeldOutScores) -> list[str]:
    """Return the lines of the card that say how well perturbations were predicted, by whatever protocol."""
    names = list(dict.fromkeys(name for figures in scores.rows.values() for name in figures))
    lines = [
        *([in_markdown(scores.headline), ""] if scores.headline else []),
        f"Protocol `{scores.protocol}` on {len(scores.perturbations)} held-out perturbations"
        f" ({in_markdown(', '.join(scores.perturbations[:10]))}):",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for row, figures in scores.rows.items():
        means = [figures[name].mean if name in figures else None for name in names]
        cells = ["" if mean is None else f"{mean:.3g}" for mean in means]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return [*lines, "", *(f"- {in_markdown(sentence)}" for sentence in scores.words)]


def _scores(metrics: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{metrics['headline']}",
        "",
        f"Protocol `{metrics['protocol']}`: {metrics['cells']:,} cells on each side,"
        f" {metrics['subsamples']} subsamples; their mean ± standard deviation.",
        "",
        "| measure | model | baseline | ceiling | verdict |",
        "|---|---|---|---|---|",
    ]
    per = "cell type" if metrics["protocol"] == "distribution-v1" else "cluster of cells"
    for metric in metrics["metrics"].values():
        values = " | ".join(f"{metric[row]['mean']:.4g} ± {metric[row]['sd']:.2g}" for row in _ROWS)
        lines.append(f"| {metric['title']} ({metric['better']} is better) | {values} | {metric['verdict']} |")
    return [*lines, "", f"Baseline: a negative binomial per {per}. Ceiling: real cells against real cells."]
