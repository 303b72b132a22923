"""Options that belong together, declared once; a function turns them into one argument of a verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bgen.cli.terminal import notes

Data = Annotated[
    str,
    typer.Argument(
        help="Your cells, raw counts: .h5ad, .h5mu, AnnData in zarr, 10x .h5, 10x mtx folder, or a store; a path or an"
        " address (s3://, gs://, https://)."
    ),
]
Counts = Annotated[
    str | None,
    typer.Option(help="Matrix of raw counts: X (default), raw/X, layers/NAME, or auto: the first that is counts."),
]
GeneColumn = Annotated[str | None, typer.Option(help="Column of var with the gene ids; default: its index.")]
Floor = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Least share of the model's molecules (or the reference's genes) in the data."),
]
Layer = Annotated[str | None, typer.Option(help="Layer with the raw counts: --layer NAME is --counts layers/NAME.")]


Device = Annotated[
    str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps, or auto: a GPU with CUDA if there is one.")
]
Precision = Annotated[
    str,
    typer.Option(help="What encoder and flow compute in: float32, or bf16: faster on a GPU, less exact."),
]
Anonymous = Annotated[
    bool, typer.Option("--anonymous", help="Read a public bucket (s3://, gs://) without credentials.")
]
Payer = Annotated[
    str | None,
    typer.Option(
        "--requester-pays", help="Google Cloud project that is billed, for a bucket whose readers pay (gs://)."
    ),
]


def cells_options(
    counts: Counts = None,
    gene_column: GeneColumn = None,
    floor: Floor = None,
    layer: Layer = None,
    anonymous: Anonymous = False,
    requester_pays: Payer = None,
) -> dict[str, Any]:
    """Return how a user's cells are read: what was given of :class:`bgen.tasks.user_cells.Reading`."""
    given: dict[str, Any] = {"counts": counts, "gene_column": gene_column, "floor": floor, "layer": layer}
    if anonymous or requester_pays is not None:
        from bgen.config.data import Access

        given["access"] = Access(anonymous=anonymous, requester_pays=requester_pays)
    return {name: value for name, value in given.items() if value is not None}


def with_options(**makers: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb the options of each maker; what a maker returns becomes the argument of its name."""

    def give(verb: Callable[..., None]) -> Callable[..., None]:
        options = {name: inspect.signature(make, eval_str=True).parameters for name, make in makers.items()}
        own = inspect.signature(verb, eval_str=True)
        mine = [parameter for name, parameter in own.parameters.items() if name not in makers]

        def call(**given: Any) -> None:
            made = {name: make(**{key: given.pop(key) for key in options[name]}) for name, make in makers.items()}
            verb(**given, **made)

        every = [*mine, *(parameter for shared in options.values() for parameter in shared.values())]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in every]
        call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.__name__, call.__doc__ = verb.__name__, verb.__doc__
        return call

    return give


def read_cells(model: Any, data: str, reading: dict[str, Any], quiet: bool) -> Any:
    """Read a user's cells for a model; say on standard error what of them it knows, unless ``quiet``."""
    cells = model.read(data, **reading)
    for sentence in () if quiet else cells.matched.sentences():
        notes.print(sentence, highlight=False, soft_wrap=True)
    return cells
