"""``bgen serve``. Heavy imports stand inside the verb, so ``--help`` is quick."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from bgen.cli.options import Device, Precision
from bgen.cli.terminal import notes
from bgen.errors import UserError

app = typer.Typer(help="A model behind HTTP.")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Model directory, hf://owner/name, or models:/name/version.")],
    host: Annotated[str, typer.Option(help="Address; one that others reach needs BGEN_TOKEN.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: one that is free.")] = 8000,
    cells: Annotated[int, typer.Option(min=1, max=10_000_000, help="Cells of a question or answer, at most.")] = 20_000,
    body: Annotated[int, typer.Option(min=1, max=65536, help="MiB of a request, at most.")] = 256,
    waiting: Annotated[int, typer.Option(min=1, max=100_000, help="Questions that may wait; more get 429.")] = 256,
    device: Device = "auto",
    precision: Precision = "float32",
    seconds: Annotated[float, typer.Option(min=0.1, max=86400, help="That a client has to send a request.")] = 60.0,
) -> None:
    """Answer generate, embed, annotate and perturb over HTTP, as JSON or .h5ad (extra `serve`).

    / is a page for browsers, /docs its API page.

    If BGEN_TOKEN is set, clients send it: `Authorization: Bearer TOKEN`.

    Example: `bgen serve bgen-demo/model --port 8000`
    """
    from bgen.tasks.load import load_model

    try:
        from bgen.serve.app import Limits
        from bgen.serve.app import serve as run
    except ImportError as error:
        raise UserError(f"bgen serve needs {error.name}: pip install 'bgen-flow[serve]'.") from None
    limits = Limits(body << 20, cells, waiting, seconds)
    token = os.environ.get("BGEN_TOKEN") or None
    run(
        load_model(model, device, precision=precision),
        host=host,
        port=port,
        limits=limits,
        token=token,
        say=notes.print,
    )
