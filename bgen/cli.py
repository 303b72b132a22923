"""The command line: verbs to functions, nothing else. Heavy imports stand inside the verbs, so ``--help`` is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bgen import __version__
from bgen.config.errors import UserError
from bgen.distributed.report import report_user_error

app = typer.Typer(
    name="bgen",
    help="Generative models of gene expression: stream counts, train with DeepSpeed, hand a model to biologists.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Check, build and inspect stores of counts.", no_args_is_help=True)
config_app = typer.Typer(help="Show and check configurations.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

out_console = Console()
note_console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Seed = Annotated[int, typer.Option(help="Seed.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides such as train.steps=500.", show_default=False)]


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (what, done, in all) that shows a progress bar on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=note_console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance


def version(show: bool) -> None:
    """Print the version and stop."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Hold the options that stand before every verb."""


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Your .h5ad of counts; default: simulated cells.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("bgen-demo"),
    seed: Seed = 0,
    overrides: Overrides = None,
) -> None:
    """Do the whole job once: simulate or take your data, check, build, train, generate, evaluate, report.

    Example: `bgen demo`, or `bgen demo --data my.h5ad --out my-demo`
    """
    from bgen.tasks.demo import run_demo

    run_demo(data, out, seed=seed, overrides=overrides or [], console=out_console, progress=progress_bar)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of one that comes with bgen.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest verified checkpoint.")] = False,
) -> None:
    """Train a VAE or a flow; on several ranks under torchrun or deepspeed.

    Example: `bgen train configs/demo/vae.yaml train.steps=500`

    Example: `torchrun --nproc-per-node 2 -m bgen train configs/demo/vae.yaml`
    """
    from bgen.config.load import load_config
    from bgen.train.run import train as run

    run(load_config(config, overrides or []), resume=resume)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder of `bgen train`.")],
    out: Annotated[Path, typer.Option(help="Folder of the model; must not be there, or be empty.")],
) -> None:
    """Write the newest verified checkpoint of a run as a model directory: safetensors and JSON, no pickle.

    Example: `bgen export runs/flow --out my-model`
    """
    from bgen.train.run import export as run_export

    run_export(run, out)
    out_console.print(f"Model: {out}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    out: Annotated[Path, typer.Option(help="The .h5ad to write.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Cells to generate.")] = 1000,
    where: Annotated[list[str] | None, typer.Option(help="Condition asked for, column=value; may be repeated.")] = None,
    library_size: Annotated[
        float | None, typer.Option(min=1, help="Total counts per cell; default: generated.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is the conditional model.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun or midpoint.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Generate cells as counts.

    Example: `bgen generate bgen-demo/model --n 1000 --where cell_type=T1 --out cells.h5ad`
    """
    from bgen.tasks.model import load_model, parse_where
    from bgen.tasks.output import require_new_file, write_h5ad

    require_new_file(out)
    loaded = load_model(model)
    with progress_bar() as progress:
        cells = loaded.generate(
            n,
            where=parse_where(where or []),
            library_size=library_size,
            guidance=guidance,
            steps=steps,
            solver=solver,
            seed=seed,
            progress=progress,
        )
    write_h5ad(cells, out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "cells": cells.n_obs, "genes": cells.n_vars}))
    else:
        out_console.print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes: {out}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    data: Annotated[Path, typer.Option(help="Store with the splits train and test.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and metrics.json.")],
    generated: Annotated[Path | None, typer.Option(help="Score these cells instead of generating new ones.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with its own samples.")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Score a model beside a per-type baseline and a real-versus-real ceiling, and write a report.

    Example: `bgen evaluate bgen-demo/model --data bgen-demo/store --out bgen-demo/report`
    """
    from bgen.tasks.score import score

    with progress_bar() as progress:
        scores = score(model, data, out, generated=generated, seeds=seeds, seed=seed, progress=progress)
    if as_json:
        typer.echo(json.dumps(scores.as_json()))
    else:
        out_console.print(scores.table())
        out_console.print(f"Report: {out / 'report.html'}")


CountsOption = Annotated[str | None, typer.Option("--counts", help="Matrix of counts: X, raw/X, layers/NAME.")]
Files = Annotated[list[Path], typer.Argument(help=".h5ad, 10x .h5, or 10x mtx folders.", show_default=False)]
Role = Annotated[str | None, typer.Option(help="obs column with this role; default: detected; none: there is none.")]
RoundOption = Annotated[str, typer.Option("--round", help="Values that are no integers: none, nearest, stochastic.")]
MergeOption = Annotated[str, typer.Option("--merge-duplicates", help="Columns of the same gene: no, sum.")]
GeneColumn = Annotated[str | None, typer.Option(help="Column of var with the gene ids; default: its index.")]
Unnamed = Annotated[bool, typer.Option("--accept-unnamed-genes", help="Go on where genes are only numbered.")]
PrimaryOnly = Annotated[bool, typer.Option("--primary-only", help="Leave out cells that are copies.")]
Organism = Annotated[str | None, typer.Option(help="Overrides what the file declares.")]


@data_app.command("simulate")
def data_simulate(
    out: Annotated[Path, typer.Option(help="The .h5ad to write.")],
    preset: Annotated[str, typer.Option(help="tiny or demo.")] = "demo",
    cells: Annotated[int | None, typer.Option(help="Cells; default: the preset's.")] = None,
    genes: Annotated[int | None, typer.Option(help="Genes; default: the preset's.")] = None,
    seed: Seed = 0,
) -> None:
    """Simulate counts with known truth: lineages over time, a gene network, knock-outs, doses, batches.

    Example: `bgen data simulate --preset demo --out cells.h5ad`
    """
    from bgen.tasks.output import require_new_file, write_h5ad
    from data_tools.simulate import simulate

    require_new_file(out)
    adata = simulate(preset, cells=cells, genes=genes, seed=seed)
    write_h5ad(adata, out)
    out_console.print(f"{adata.n_obs:,} cells x {adata.n_vars:,} genes: {out}")


@data_app.command("check")
def data_check(
    files: Files,
    counts: CountsOption = None,
    rounding: RoundOption = "none",
    gene_column: GeneColumn = None,
    merge_duplicates: MergeOption = "no",
    accept_unnamed_genes: Unnamed = False,
    organism: Organism = None,
    primary_only: PrimaryOnly = False,
    cell_type: Role = None,
    batch: Role = None,
    donor: Role = None,
    condition: Role = None,
    perturbation: Role = None,
    control: Annotated[str | None, typer.Option(help="The perturbation that means none.")] = None,
    time: Role = None,
    time_unit: Annotated[str | None, typer.Option(help="Unit of time, such as hours.")] = None,
    dose: Role = None,
    dose_unit: Annotated[str | None, typer.Option(help="Unit of dose, such as uM.")] = None,
    population: Role = None,
    as_json: Json = False,
) -> None:
    """Check that files hold what training needs; all findings in one table, exit code 2 if one is an error.

    Example: `bgen data check cells.h5ad --cell-type celltype`
    """
    report = _check(**locals())
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1))
    else:
        report.print(out_console)
    if report.errors:
        raise typer.Exit(2)


@data_app.command("build")
def data_build(
    files: Files,
    out: Annotated[Path, typer.Option(help="Folder of the store; must not be there, or be empty.")],
    profile: Annotated[str, typer.Option(help="small (zstd, for networks and disks) or fast (lz4).")] = "small",
    splits: Annotated[str, typer.Option(help="Fractions of the splits.")] = "train=0.8,valid=0.1,test=0.1",
    split_by: Annotated[str | None, typer.Option(help="Column kept together in one split; default: cells.")] = None,
    seed: Seed = 0,
    counts: CountsOption = None,
    rounding: RoundOption = "none",
    gene_column: GeneColumn = None,
    merge_duplicates: MergeOption = "no",
    accept_unnamed_genes: Unnamed = False,
    organism: Organism = None,
    primary_only: PrimaryOnly = False,
    cell_type: Role = None,
    batch: Role = None,
    donor: Role = None,
    condition: Role = None,
    perturbation: Role = None,
    control: Annotated[str | None, typer.Option(help="The perturbation that means none.")] = None,
    time: Role = None,
    time_unit: Annotated[str | None, typer.Option(help="Unit of time, such as hours.")] = None,
    dose: Role = None,
    dose_unit: Annotated[str | None, typer.Option(help="Unit of dose, such as uM.")] = None,
    population: Role = None,
    as_json: Json = False,
) -> None:
    """Check files and write them into a store; nothing is written if the check finds an error.

    Example: `bgen data build cells.h5ad --out store --splits train=0.7,valid=0.1,test=0.2`
    """
    given = locals()
    from bgen.tasks.output import require_new_folder
    from data_tools.build import build
    from data_tools.splits import parse_splits

    fractions = parse_splits(splits)
    if profile not in ("small", "fast"):
        raise UserError(f"There is no profile '{profile}': choose small or fast.")
    require_new_folder(out)
    report = _check(**{name: value for name, value in given.items() if name in CHECK_ARGUMENTS})
    if report.errors or not as_json:
        report.print(note_console if as_json else out_console)
    if report.errors:
        raise typer.Exit(2)
    with progress_bar() as progress:
        manifest = build(
            report,
            out,
            created_by=f"bgen {__version__}",
            profile=profile,
            splits=fractions,
            split_by=split_by,
            seed=seed,
            progress=progress,
        )
    _print_manifest(out, manifest, as_json)


@data_app.command("info")
def data_info(store: Path, as_json: Json = False) -> None:
    """Say what a store holds.

    Example: `bgen data info store`
    """
    from bgen.data.manifest import read_manifest

    _print_manifest(store, read_manifest(store), as_json)


@data_app.command("verify")
def data_verify(store: Path) -> None:
    """Read every byte of a store and compare it with the manifest; exit code 2 if one differs.

    Example: `bgen data verify store`
    """
    from bgen.data.manifest import check_files, read_manifest

    manifest = read_manifest(store)
    problems = check_files(store, manifest, checksums=True)
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"The store {store} is damaged:\n  {listed}\nRestore these files or build it again.")
    out_console.print(f"{store}: all {len(manifest.files)} files are as they were written.")


CHECK_ARGUMENTS = (
    "files",
    "counts",
    "rounding",
    "gene_column",
    "merge_duplicates",
    "accept_unnamed_genes",
    "organism",
    "primary_only",
    "cell_type",
    "batch",
    "donor",
    "condition",
    "perturbation",
    "control",
    "time",
    "time_unit",
    "dose",
    "dose_unit",
    "population",
)


def _check(
    files: list[Path],
    counts: str | None,
    rounding: str,
    gene_column: str | None,
    merge_duplicates: str,
    accept_unnamed_genes: bool,
    organism: str | None,
    primary_only: bool,
    condition: str | None,
    as_json: bool = False,
    **roles: str | None,
) -> Any:
    """Run the check with the options of the command line."""
    from data_tools.check import CheckOptions, check
    from data_tools.findings import Roles

    for option, value, choices in (
        ("--round", rounding, ("none", "nearest", "stochastic")),
        ("--merge-duplicates", merge_duplicates, ("no", "sum")),
    ):
        if value not in choices:
            raise UserError(f"{option} is one of {', '.join(choices)}, not '{value}'.")
    options = CheckOptions(
        counts=counts,
        rounding=rounding,  # type: ignore[arg-type]
        gene_column=gene_column,
        merge_duplicates=merge_duplicates,  # type: ignore[arg-type]
        accept_unnamed_genes=accept_unnamed_genes,
        organism=organism,
        primary_only=primary_only,
        roles=Roles(condition=tuple(condition.split(",")) if condition else (), **roles),  # type: ignore[arg-type]
    )
    with note_console.status("reading"):
        return check(files, options)


def _print_manifest(folder: Path, manifest: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(manifest.model_dump(exclude={"files"})))
        return
    size = sum(file.bytes for file in manifest.files.values())
    density = manifest.n_nonzeros / (manifest.n_cells * manifest.n_genes)
    lines = {
        "store": f"{folder} ({size / 1e6:,.1f} MB, {size / manifest.n_cells:,.0f} bytes a cell, {manifest.profile})",
        "cells": f"{manifest.n_cells:,}: " + ", ".join(f"{name} {n:,}" for name, n in manifest.splits.items()),
        "genes": f"{manifest.n_genes:,} ({manifest.organism}), {1 - density:.1%} of the counts are zero",
        "columns": ", ".join(manifest.columns) or "none",
        "roles": ", ".join(f"{role} = {column}" for role, column in manifest.roles.items()) or "none",
        "sources": ", ".join(f"{source.name} ({source.kept:,} cells)" for source in manifest.sources),
        "fingerprint": manifest.fingerprint[:16],
    }
    for name, text in lines.items():
        out_console.print(f"[bold]{name:>12}[/]  {text}", highlight=False)


@config_app.command("show")
def config_show(config: str, overrides: Overrides = None) -> None:
    """Print the resolved configuration.

    Example: `bgen config show demo/vae train.steps=10`
    """
    from bgen.config.load import load_config, to_yaml

    typer.echo(to_yaml(load_config(config, overrides or [])), nl=False)


@config_app.command("check")
def config_check(config: str, overrides: Overrides = None) -> None:
    """Check a configuration: exit code 0 if it is valid, else 2 and what is wrong.

    Example: `bgen config check demo/vae train.steps=10`
    """
    from bgen.config.load import load_config

    load_config(config, overrides or [])
    typer.echo(f"{config} is valid.")


def main() -> None:
    """Run the command line: a user's mistake is one message and exit code 2, without a traceback."""
    # The deepspeed launcher puts --local_rank=N before our own arguments; LOCAL_RANK in the environment says the same.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    try:
        app()
    except UserError as error:
        sys.exit(report_user_error(error))
    except KeyboardInterrupt:
        note_console.print("\nStopped.")
        sys.exit(130)
