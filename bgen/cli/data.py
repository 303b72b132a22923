"""``bgen data ...``: verbs to functions, nothing else. Heavy imports stand inside the verbs, so ``--help`` is quick."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from bgen.cli.options import cells_options, with_options
from bgen.cli.terminal import Json, Seed, notes, progress_bar, results
from bgen.errors import MOST_CELLS, UserError
from bgen.files import require_new_file, require_new_folder, require_new_h5ad, write_h5ad
from bgen.names import shown
from bgen.version import __version__

app = typer.Typer(help="Check, build and inspect stores of counts.", no_args_is_help=True)

Files = Annotated[
    list[str],
    typer.Argument(
        help=".h5ad, .h5mu, AnnData in zarr, 10x .h5, 10x mtx folders, parquet, or SOMA; paths, or addresses (s3://,"
        " gs://, https://).",
        show_default=False,
    ),
]
Role = Annotated[str | None, typer.Option(help="obs column with this role; default: detected; none: no column.")]


Where = Annotated[
    str,
    typer.Argument(help="Folder or address (s3://, gs://, https://) of a store, or AnnData in zarr.", metavar="STORE"),
]


def check_options(
    rounding: Annotated[
        str, typer.Option("--round", help="How to round values that are no integers: none, nearest, stochastic.")
    ] = "none",
    merge_duplicates: Annotated[str, typer.Option(help="Columns of the same gene: no, sum.")] = "no",
    accept_unnamed_genes: Annotated[
        bool, typer.Option("--accept-unnamed-genes", help="Go on where genes are only numbered.")
    ] = False,
    organism: Annotated[str | None, typer.Option(help="Overrides what the file declares.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Genes to match: a file of ids, a store or a model; default: those of all inputs."),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option("--obs", help="A table with a row for each file, its name first; the rest are added to obs."),
    ] = None,
    primary_only: Annotated[bool, typer.Option("--primary-only", help="Leave out cells that are copies.")] = False,
    cell_type: Role = None,
    batch: Role = None,
    donor: Role = None,
    condition: Role = None,
    perturbation: Role = None,
    control: Annotated[str | None, typer.Option(help="The perturbation that means none.")] = None,
    separator: Annotated[
        str | None, typer.Option(help="Between the names of a perturbation; none: one name; default: found, or '+'.")
    ] = None,
    time: Role = None,
    time_unit: Annotated[str | None, typer.Option(help="Unit of time, such as hours.")] = None,
    dose: Role = None,
    dose_unit: Annotated[str | None, typer.Option(help="Unit of dose, such as uM.")] = None,
    population: Role = None,
) -> Any:
    """Turn the options that `check` and `build` share into :class:`data_tools.check.check.CheckOptions`."""
    from data_tools.check.check import CheckOptions
    from data_tools.check.findings import Roles

    for option, value, choices in (
        ("--round", rounding, ("none", "nearest", "stochastic")),
        ("--merge-duplicates", merge_duplicates, ("no", "sum")),
    ):
        if value not in choices:
            raise UserError(f"{option} is one of {', '.join(choices)}, not '{value}'.")
    return CheckOptions(
        rounding=rounding,  # type: ignore[arg-type]
        merge_duplicates=merge_duplicates,  # type: ignore[arg-type]
        accept_unnamed_genes=accept_unnamed_genes,
        organism=organism,
        reference=reference,
        samples=samples,
        primary_only=primary_only,
        roles=Roles(
            cell_type=cell_type,
            batch=batch,
            donor=donor,
            condition=tuple(condition.split(",")) if condition else (),
            perturbation=perturbation,
            control=control,
            separator=separator,
            time=time,
            time_unit=time_unit,
            dose=dose,
            dose_unit=dose_unit,
            population=population,
        ),
    )


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="The .h5ad to write.")],
    preset: Annotated[
        str,
        typer.Option(
            help="tiny or demo (lineages over time); atlas, lines or crowd (screens in many contexts); pathways or "
            "regulators (cells of known programmes)."
        ),
    ] = "demo",
    cells: Annotated[int | None, typer.Option(min=1, max=MOST_CELLS, help="Cells; default: the preset's.")] = None,
    genes: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Genes; default: the preset's.")] = None,
    known: Annotated[
        Path | None,
        typer.Option(
            help="What is known, to write: of pathways gene sets (.gmt), of regulators edges (.csv), of screens what "
            "each perturbation drives (.csv)."
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Simulate counts with known truth: lineages over time, a gene network, knock-outs, doses, batches; or screens.

    Example: `bgen data simulate --preset demo --out cells.h5ad`
    """
    from data_tools.simulate.programmes import PROGRAMMES, simulate_programmes, write_known
    from data_tools.simulate.screens import SCREENS, simulate_screens, write_drives
    from data_tools.simulate.simulate import simulate as simulate_lineages

    require_new_h5ad(out)
    if known is not None:
        require_new_file(known)
    if known is not None and preset not in PROGRAMMES | SCREENS:
        raise UserError(f"--known is for the presets {', '.join(PROGRAMMES | SCREENS)}, not for {preset}.")
    draw = simulate_programmes if preset in PROGRAMMES else simulate_screens if preset in SCREENS else simulate_lineages
    adata = draw(preset, cells=cells, genes=genes, seed=seed)
    write_h5ad(adata, out)
    if known is not None:
        (write_known if preset in PROGRAMMES else write_drives)(adata, known)
    results.print(f"{adata.n_obs:,} cells x {adata.n_vars:,} genes: {out}")


@app.command()
@with_options(reading=cells_options, options=check_options)
def check(files: Files, *, reading: Any, options: Any, as_json: Json = False) -> None:
    """Check that files hold what training needs; all findings in one table, exit code 2 if one is an error.

    Example: `bgen data check cells.h5ad --cell-type celltype`
    """
    report = _check(files, options, reading)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1))
    else:
        report.print(results)
    if report.errors:
        raise typer.Exit(2)


@app.command()
@with_options(reading=cells_options, options=check_options)
def build(
    files: Files,
    out: Annotated[Path, typer.Option(help="Folder of the store; must not be there, or be empty.")],
    *,
    reading: Any,
    options: Any,
    profile: Annotated[str, typer.Option(help="small (zstd, for networks and disks) or fast (lz4).")] = "small",
    splits: Annotated[str, typer.Option(help="Fractions of the splits.")] = "train=0.8,valid=0.1,test=0.1",
    split_by: Annotated[str | None, typer.Option(help="Column kept together in one split; default: cells.")] = None,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="Values of that column for a split: test=48,72; may come again.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, max=1024, help="Processes; default: as the input needs.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="A Dask scheduler to use, tcp://host:port.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an interrupted build left.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Check files and write them into a store; nothing is written if the check finds an error.

    Example: `bgen data build cells.h5ad --out store --splits train=0.7,valid=0.1,test=0.2`

    Example: `bgen data build cells.h5ad --out store --split-by time --hold-out test=48`
    """
    from data_tools.building.build import build as write
    from data_tools.building.splits import describe_shares, parse_held_out, parse_splits

    fractions = parse_splits(splits)
    if profile not in ("small", "fast"):
        raise UserError(f"There is no profile '{profile}': choose small or fast.")
    require_new_folder(out)
    report = _check(files, options, reading)
    if report.errors or not as_json:
        report.print(notes if as_json else results)
    if report.errors:
        raise typer.Exit(2)
    with progress_bar() as progress:
        manifest = write(
            report,
            out,
            created_by=f"bgen {__version__}",
            profile=profile,
            splits=fractions,
            split_by=split_by,
            held_out=parse_held_out(hold_out or []),
            reference=options.reference,
            seed=seed,
            workers=workers,
            scheduler=scheduler,
            restart=restart,
            progress=progress,
        )
    _print_manifest(out, manifest, as_json)
    if split_by is not None and not hold_out:
        for sentence in describe_shares(fractions, manifest.splits, split_by):
            notes.print(sentence, highlight=False, markup=False, soft_wrap=True)


@app.command()
def info(store: Where, as_json: Json = False) -> None:
    """Say what a store holds.

    Example: `bgen data info store`
    """
    from bgen.store.open import open_manifest

    _print_manifest(store, open_manifest(store), as_json)


@app.command()
def verify(store: Where) -> None:
    """Read every byte of a store and compare it with the manifest; exit code 2 if one differs.

    Example: `bgen data verify store`
    """
    from bgen.store.open import find_damaged_files

    if problems := find_damaged_files(store):
        listed = "\n  ".join(problems)
        raise UserError(f"The store {store} is damaged:\n  {listed}\nRestore these files or build it again.")
    results.print(f"{store}: every file is as it was written.")


@app.command("to-anndata")
def to_anndata(
    store: Where,
    out: Annotated[Path, typer.Option(help="A new file .h5ad, or a new folder .zarr.")],
    split: Annotated[str | None, typer.Option(help="Only the cells of this split.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the counts: float32 or uint32.")] = "float32",
) -> None:
    """Write the cells of a store as AnnData, streaming.

    Example: `bgen data to-anndata store --out cells.h5ad --split test`
    """
    from bgen.store.open import open_store
    from data_tools.export.to_anndata import to_anndata as write

    opened = open_store(store)
    with progress_bar() as progress:
        cells = write(opened, out, split=split, dtype=dtype, progress=functools.partial(progress, "writing"))
    results.print(f"{cells:,} cells: {out}")


@app.command("to-webdataset")
def to_webdataset(
    store: Annotated[str, typer.Argument(help="Folder of a store.")],
    out: Annotated[Path, typer.Option(help="A new folder for the tar shards and their index.")],
    blocks_per_shard: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Blocks of about 256 cells in a shard.")
    ] = 256,
) -> None:
    """Write a store as WebDataset: tar shards of blocks of cells, with an index that training resumes by.

    Example: `bgen data to-webdataset store --out shards`
    """
    from bgen.store.remote import is_remote
    from bgen.store.store import Store
    from data_tools.export.to_webdataset import to_webdataset as write

    if is_remote(store):
        raise UserError(f"{store}: copy the store to this machine first. to-webdataset reads all of it, from a folder.")
    opened = Store(store)
    with progress_bar() as progress:
        shards = write(opened, out, blocks_per_shard=blocks_per_shard, progress=functools.partial(progress, "writing"))
    results.print(f"{shards} shards: {out}")


def _check(files: list[str], options: Any, reading: dict[str, Any]) -> Any:
    from data_tools.check.check import check as look

    if "layer" in reading:
        if "counts" in reading:
            raise UserError("--layer and --counts both name the matrix of counts: give one of them.")
        reading = {**reading, "counts": f"layers/{reading['layer']}"}
        del reading["layer"]
    if "floor" in reading and options.reference is None:
        raise UserError("--floor is a share of the genes of --reference: give that, too.")
    options = replace(options, **reading)
    with notes.status("reading"):
        return look(files, options)


def _print_manifest(where: Path | str, manifest: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(manifest.model_dump(exclude={"files"})))
        return
    size = sum(file.bytes for file in manifest.files.values())
    density = manifest.n_nonzeros / (manifest.n_cells * manifest.n_genes)
    lines = {
        "store": f"{where} ({size / 1e6:,.1f} MB, {size / manifest.n_cells:,.0f} bytes a cell, {manifest.profile})",
        "cells": f"{manifest.n_cells:,}: " + ", ".join(f"{name} {n:,}" for name, n in manifest.splits.items()),
        "genes": f"{manifest.n_genes:,} ({manifest.organism}), {1 - density:.1%} of the counts are zero",
        "columns": ", ".join(manifest.columns) or "none",
        "roles": ", ".join(f"{role} = {column}" for role, column in manifest.roles.items()) or "none",
        "sources": ", ".join(f"{source.name} ({source.kept:,} cells)" for source in manifest.sources),
        "fingerprint": manifest.fingerprint[:16],
    }
    for name, text in lines.items():
        results.print(Text.assemble((f"{name:>12}", "bold"), f"  {shown(text)}"), highlight=False)
