"""The command line: verbs to functions, nothing else. Heavy imports stand inside the verbs, so ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bgen.cli.bench import app as bench_app
from bgen.cli.cells import app as cells_app
from bgen.cli.data import app as data_app
from bgen.cli.finetune import app as finetune_app
from bgen.cli.genes import app as genes_app
from bgen.cli.operate import app as operate_app
from bgen.cli.operate import tune_app
from bgen.cli.perturb import app as perturb_app
from bgen.cli.serve import app as serve_app
from bgen.cli.terminal import Overrides, Seed, notes, progress_bar, results
from bgen.cli.time import app as time_app
from bgen.cli.train import app as train_app
from bgen.cli.train import config_app, track_app
from bgen.distributed.report import report_user_error
from bgen.errors import UserError, memory_ran_out
from bgen.names import shown
from bgen.version import __version__

app = typer.Typer(
    name="bgen",
    help="Generative models of gene expression: stream counts, train with DeepSpeed, hand a model to biologists.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(train_app)
app.add_typer(operate_app)
app.add_typer(serve_app)
app.add_typer(cells_app)
app.add_typer(time_app)
app.add_typer(perturb_app)
app.add_typer(finetune_app)
app.add_typer(genes_app)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")
app.add_typer(track_app, name="track")
app.add_typer(tune_app, name="tune")


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
    from bgen.demo import run_demo

    run_demo(data, out, seed=seed, overrides=overrides or [], console=results, progress=progress_bar)


def main() -> None:
    """Run the command line: a user's mistake is one message and exit code 2, without a traceback.

    So is what the operating system refuses: a file that may not be read, a name that is too long, a full disk.
    """
    # The deepspeed launcher puts --local_rank=N before our own arguments; LOCAL_RANK in the environment says the same.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    try:
        app()
    except UserError as error:
        error.args = (shown(error),)
        sys.exit(report_user_error(error))
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(report_user_error(UserError(shown(f"{where}{error.strerror or error}."))))
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        wanted = f" ({str(error).strip().partition(chr(10))[0]})" if str(error) else ""
        sys.exit(report_user_error(UserError(f"There is not enough memory for this{wanted}.")))
    except KeyboardInterrupt:
        notes.print("\nStopped.")
        sys.exit(130)
