"""``bgen bench dna``: what a gene's sequence tells of genes that training never saw, by k-mers and by networks.

Each row learns, from the sequences of four fifths of the genes, their level and the components of their deviations over
groups of cells, and tells those of the others. Beside it stands its control: the same, with the positions of every
sequence in another order. What the control knows, it knows from the shares of the bases; a sequence model that is not
hurt by it has not used the order. Networks have about as many parameters, and are judged against the k-mers, too.

Axes: G genes, L positions, K components.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from bgen.arrays import F64
from bgen.bench.kept import RUN, Kept
from bgen.bench.quality.compared import TIME, Compared, Figures
from bgen.bench.sequences.table import through_the_table
from bgen.config.sequences import SequenceConfig, SequenceMixer, SequenceTraining
from bgen.errors import UserError, nearest
from bgen.files import write_h5ad, write_result
from bgen.genes.sequences import kmer_shares, read_fasta, shuffled
from bgen.models.sequences.regression import SequenceRegression, fit_sequences
from bgen.models.sequences.words import fit_words
from bgen.progress import Say
from bgen.tasks.gene_vectors import COMPONENTS, count_genes, sequence_rows
from bgen.version import __version__
from data_tools.simulate.promoters import simulate_promoters

KMERS = "4-mers"
K = 4
TEST = 0.2
"""Share of the genes that no training sees."""
CONTROL = ", shuffled"
THROUGH = "through the table: "
"""How rows begin in the file of kept figures that were measured through a gene table."""
SIMULATED = {"genes": 1200, "length": 96, "cells": 300}


def bench_dna(
    fasta: Path | None,
    cells: Path | None,
    out: Path,
    *,
    by: Sequence[str],
    seeds: int = 3,
    only: Sequence[str] = (),
    config: SequenceConfig | None = None,
    training: SequenceTraining | None = None,
    simulated: Mapping[str, int] | None = None,
    vae_steps: int = 0,
    resume: bool = False,
    say: Say,
) -> list[Compared]:
    """Compare, and write ``dna.json``; the second comparison, if there is one, is that through a gene table.

    Figures are kept in ``rows.jsonl`` as they are found, and a comparison that was stopped goes on from there.

    Parameters
    ----------
    fasta, cells
        Sequences and counts; unused for simulated ones.
    by
        obs columns whose combinations are the groups.
    only
        Names of rows, beside the k-mers; none: all.
    config
        Sizes of the networks; ``mixer`` and, so that parameters are about equal, ``channels`` are those of each row.
    simulated
        Promoters in which order decides, of these sizes (:data:`SIMULATED`), instead of files.
    vae_steps
        Training steps of a VAE with vectors of the k-mers, of the first network and of its control; 0: none.
    resume
        Go on in ``out``, with the same settings; networks may be others.

    Raises
    ------
    UserError
        If a file, a column or a row's name cannot be used.
    """
    config, training = config or SequenceConfig(), training or SequenceTraining()
    mixers = list(get_args(SequenceMixer))
    for name in only:
        if name not in mixers:
            raise UserError(f"--only: there is no row '{name}'.{nearest(name, mixers)}")
    if simulated is not None:
        data, by = "simulated promoters", ["cell_type"]
    elif fasta is None or cells is None:
        raise UserError("Name a FASTA file and a file of counts, or take --simulated.")
    else:
        data = f"{fasta.name}, {cells.name}"
    facts: dict[str, Any] = {
        "bgen": __version__,
        "data": data,
        "simulated": None if simulated is None else dict(simulated),
        "by": list(by),
        "config": config.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "vae_steps": vae_steps,
    }
    kept = Kept(out, facts, resume=resume)
    if simulated is not None:
        made = simulate_promoters(**simulated, seed=0)
        fasta, cells = out / "promoters.fa", out / "cells.h5ad"
        write_result(fasta, made.fasta)
        if not cells.is_file():
            write_h5ad(made.cells, cells)
    assert fasta is not None
    assert cells is not None
    sequences, counted = read_fasta(fasta), count_genes(cells, by)
    rows, usable = sequence_rows(sequences, counted)
    say(sequences.sentence(rows))
    codes = {"": sequences.codes[rows[usable]]}
    codes[CONTROL] = shuffled(codes[""], 0)
    networks = equal_sizes([name for name in mixers if not only or name in only], config, codes[""].shape[1])
    rows_told = [name + order for order in codes for name in (KMERS, *networks)]
    by_table = [name for name in (KMERS, *[*networks][:1]) if vae_steps]
    by_table += [name + CONTROL for name in by_table if name != KMERS]
    for seed in range(seeds):
        held = np.random.default_rng([seed, 64]).permutation(len(usable)) < TEST * len(usable)
        targets, weights = counted.profiles.targets(usable[~held], COMPONENTS)
        y = targets[usable]
        for order, some in codes.items():
            shares = kmer_shares(some, K)
            for name in (KMERS, *networks):
                row, through = name + order, name + order in by_table and (THROUGH + name + order, seed) not in kept
                if (row, seed) in kept and not through:
                    continue
                began, steps = time.process_time(), 0
                if name == KMERS:
                    vectors, predicted = shares.astype(np.float32), fit_words(shares[~held], y[~held]).predict(shares)
                else:
                    fitted = fit_sequences(some[~held], y[~held], weights, networks[name], training, seed)
                    steps = training.epochs * max(int((~held).sum()) // training.batch, 1)
                    spent = time.process_time() - began
                    vectors, predicted = fitted.vectors(some), fitted.predict(some)
                if (row, seed) not in kept:
                    kept.add(row, seed, _figures(y, predicted, held, 1e3 * spent / steps if steps else 0.0))
                if through:
                    unseen = through_the_table(counted, usable, vectors, held, out / RUN, seed, vae_steps)
                    kept.add(THROUGH + row, seed, unseen)
        last = {name: list(kept.figures[name, seed].values())[1] for name in rows_told}
        say(f"Split {seed}, component 1: " + ", ".join(f"{name} {value:.3f}" for name, value in last.items()))
    facts |= {
        "groups": counted.profiles.groups,
        "genes": len(usable),
        "held_out": int(held.sum()),
        "seeds": seeds,
        "networks": {name: sizes.model_dump() for name, sizes in networks.items()},
    }
    runs = kept.runs(rows_told, seeds)
    tables = {row: [kept.figures[THROUGH + row, seed] for seed in range(seeds)] for row in by_table}
    against = dict.fromkeys(runs, KMERS) | {name + CONTROL: name for name in (KMERS, *networks)}
    note = f"R2 over {held.sum():,} of {len(usable):,} genes, held out; ms: of a training over its steps."
    told = [Compared(f"What sequences tell of unseen genes: {data}", against, runs, facts, note)]
    if tables:
        note = f"R2 over {held.sum():,} genes of which the VAE has seen nothing."
        judged = {name: against[name] for name in tables}
        told.append(Compared(f"The same through a gene table: {data}", judged, tables, {}, note))
    found = {key: one.as_json() for key, one in zip(("sequences", "gene_table"), told, strict=False)}
    write_result(out / "dna.json", json.dumps(found, indent=1) + "\n")
    return told


def equal_sizes(mixers: Sequence[str], config: SequenceConfig, length: int) -> dict[str, SequenceConfig]:
    """Return the settings of each network, with channels such that all have about as many parameters as Hyena's."""

    def parameters(sizes: SequenceConfig) -> int:
        with torch.device("meta"):
            return sum(
                parameter.numel() for parameter in SequenceRegression(sizes, length, 1 + COMPONENTS).parameters()
            )

    target = parameters(config.model_copy(update={"mixer": "hyena"}))
    found = {}
    for name in mixers:
        widths = range(8, 4 * config.channels, 8)
        sizes = [config.model_copy(update={"mixer": name, "channels": width}) for width in widths]
        found[name] = min(sizes, key=lambda one: abs(parameters(one) - target))
    return found


def _figures(y: F64, told: F64, held: NDArray[np.bool_], spent: float) -> Figures:
    error = np.square(told - y)[held].sum(0)
    r2 = 1 - error / np.square(y[held] - y[~held].mean(0)).sum(0)
    names = ["log mean", *(f"component {number}" for number in range(1, y.shape[1]))]
    return {**dict(zip(names, r2.tolist(), strict=True)), TIME: spent}
