"""Verbs about genes themselves: vectors from their sequences. Heavy imports stand inside, so ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from bgen.cli.terminal import Seed, notes, progress_bar
from bgen.errors import UserError, nearest

app = typer.Typer()


@app.command("vectors")
def vectors(
    fasta: Annotated[Path, typer.Argument(help="Sequences of genes, FASTA, such as promoters.")],
    cells: Annotated[Path, typer.Argument(help="Counts of the genes to learn from, .h5ad.")],
    out: Annotated[Path, typer.Option(help="The .csv to write: a row for each sequence.")],
    by: Annotated[
        list[str] | None, typer.Option(help="obs column of groups of cells; repeatable. Default: cell_type.")
    ] = None,
    mixer: Annotated[str, typer.Option(help="hyena, mamba2, attention or convolution.")] = "hyena",
    size: Annotated[int, typer.Option(min=1, max=1024, help="Numbers of a vector.")] = 32,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Passes over the genes; default: as trained.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Learn from sequences where genes are expressed, and write vectors of all that have one, for `vectors.files`.

    Example: `bgen vectors promoters.fa cells.h5ad --out vectors.csv`
    """
    from bgen.config.sequences import SequenceConfig, SequenceMixer, SequenceTraining
    from bgen.tasks.gene_vectors import gene_vectors

    if mixer not in get_args(SequenceMixer):
        raise UserError(f"--mixer: there is no '{mixer}'.{nearest(mixer, get_args(SequenceMixer))}")
    config = SequenceConfig.model_validate({"mixer": mixer, "size": size})
    training = SequenceTraining() if epochs is None else SequenceTraining(epochs=epochs)
    with progress_bar() as progress:
        gene_vectors(
            fasta,
            cells,
            out,
            by or ["cell_type"],
            config,
            training,
            seed=seed,
            say=notes.print,
            progress=lambda done, total: progress("vectors", done, total),
        )
