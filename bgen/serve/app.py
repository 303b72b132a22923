"""``bgen serve``: a model behind HTTP, with limits, a token, health, metrics and an OpenAPI page (FastAPI).

Cells come as JSON or as an .h5ad and go as JSON, or as an .h5ad where ``Accept`` asks for ``application/x-hdf5``.
Questions take turns (:mod:`bgen.serve.turns`), up to a limit of those that wait. Whatever a client does wrong
is a 4xx with a sentence; what it cannot mend is a 500 with a number that the log explains.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import shutil
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anndata import AnnData
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from bgen.errors import UserError
from bgen.files import write_h5ad
from bgen.serve import questions
from bgen.serve.pieces import BLOCK, json_pieces, values_in
from bgen.serve.questions import OF_CELLS, WITH_COUNTS, Cells, Generate, validated
from bgen.serve.turns import Task, Turns
from bgen.tasks.load import Model
from bgen.tasks.user_cells import read_input
from bgen.version import __version__

H5AD = "application/x-hdf5"
OPEN = ("/health", "/")
"""What is answered without the token: what an orchestrator asks, and the page, which asks for it."""

PAGE = Path(__file__).with_name("page.html")
ONLY_ITSELF = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
"""What the page may load: nothing but itself and the answers of this server."""


DRAINED = 4
"""Times the limit that is read of a body that is too large: a client that is cut off sees no answer."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes
    ----------
    body
        Bytes of a request.
    cells
        Cells of a question or of its answer.
    waiting
        Questions that are answered or wait; more are told to come again (429).
    seconds
        That a client has to send its request.
    """

    body: int = 256 << 20
    cells: int = 20_000
    waiting: int = 256
    seconds: float = 60.0


class Refused(Exception):
    """A request that is answered with ``code`` and a sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass
class Metrics:
    """Counts of what was asked, for ``/metrics``."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    waiting: int = 0

    def text(self) -> str:
        """Return them as Prometheus reads them."""
        lines = ["# TYPE bgen_requests_total counter"]
        lines += [
            f'bgen_requests_total{{path="{path}",code="{code}"}} {n}'
            for (path, code), n in sorted(self.answers.items())
        ]
        lines.append("# TYPE bgen_request_seconds_total counter")
        lines += [f'bgen_request_seconds_total{{path="{path}"}} {s:.6f}' for path, s in sorted(self.seconds.items())]
        lines += ["# TYPE bgen_requests_waiting gauge", f"bgen_requests_waiting {self.waiting}"]
        return "\n".join(lines) + "\n"


def make_app(model: Model, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """Return the application of a model.

    Parameters
    ----------
    token
        That ``Authorization: Bearer`` must give, on every path but ``/health``; None: none is needed.
    """
    limits = limits or Limits()
    app = FastAPI(title=f"bgen: {model.saved.about.name}", version=__version__)
    metrics = Metrics()
    turns = Turns(limits.cells)
    paths = {"/", "/health", "/metrics", "/model", "/generate", *(f"/{name}" for name in OF_CELLS)}

    @app.middleware("http")
    async def count(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        begin, path = time.perf_counter(), request.url.path
        known = path if path in paths else "other"
        if token is not None and path not in OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), token.encode()):
                metrics.answers[known, 401] += 1
                return _error(401, "Send the server's token: Authorization: Bearer TOKEN.")
        response = await call(request)
        metrics.answers[known, response.status_code] += 1
        metrics.seconds[known] += time.perf_counter() - begin
        return response

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": ONLY_ITSELF})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def measured() -> PlainTextResponse:
        """Requests, seconds and waiting questions, for Prometheus."""
        return PlainTextResponse(metrics.text())

    @app.get("/model")
    async def about() -> dict[str, Any]:
        """What the model is, and what it can be asked for."""
        return questions.facts(model)

    @app.post("/generate", openapi_extra=_body(Generate))
    async def generate(request: Request) -> Response:
        """Generate new cells."""

        async def answer(folder: Path) -> Response:
            asked = validated(Generate, _parsed(await _received(request, folder, limits)))
            _require_few(asked.n, limits)
            return await turns.ask(
                Task(
                    work=lambda: questions.generate(model, asked),
                    render=_renderer(request, folder, counts=True),
                    gone=request.is_disconnected,
                    kind=questions.kind_of_generate(model, asked),
                    asked=asked,
                    together=lambda each: questions.generate_together(model, each),
                    cells=asked.n,
                )
            )

        return await _in_turn(answer)

    def add(name: str) -> None:
        kind, method = OF_CELLS[name]

        @app.post(f"/{name}", name=name, description=kind.__doc__, openapi_extra=_body(kind, cells=True))
        async def ask(request: Request) -> Response:
            async def answer(folder: Path) -> Response:
                cells, asked = await _asked_of_cells(request, folder, kind, limits)
                if (n := getattr(asked, "n", None)) is not None:
                    _require_few(n, limits)
                task = Task(
                    work=lambda: method(model, _read(cells, limits), asked),
                    render=_renderer(request, folder, counts=name in WITH_COUNTS),
                    gone=request.is_disconnected,
                )
                if name == "embed" and isinstance(cells, Cells):
                    given = await asyncio.to_thread(cells.adata)
                    _require_few(given.n_obs, limits)
                    task.work = lambda: method(model, given, asked)
                    task.kind = await asyncio.to_thread(questions.kind_of_embed, model, given, asked)
                    task.asked, task.cells = (given, asked), given.n_obs
                    task.together = lambda each: questions.embed_together(model, each)
                return await turns.ask(task)

            return await _in_turn(answer)

    for name in OF_CELLS:
        add(name)

    async def _in_turn(answer: Callable[[Path], Awaitable[Response]]) -> Response:
        if metrics.waiting >= limits.waiting:
            raise Refused(429, f"{limits.waiting} questions are waiting already: come again in a few seconds.")
        metrics.waiting += 1
        folder = Path(tempfile.mkdtemp(prefix="bgen-serve-"))
        try:
            response = await answer(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            metrics.waiting -= 1
        response.background = BackgroundTask(shutil.rmtree, folder, ignore_errors=True)
        return response

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _error(error.code, str(error), **({"Retry-After": "2"} if error.code == 429 else {}))

    @app.exception_handler(UserError)
    async def mistake(_: Request, error: UserError) -> Response:
        return _error(422, str(error))

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        known = ", ".join(sorted(paths))
        said = f"{request.method} {request.url.path}: {error.detail}. There are {known}, and /docs explains them."
        return _error(error.status_code, said)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return _error(499, "The client went away.")

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return _error(422, str(error))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        number = uuid.uuid4().hex[:8]
        print(f"bgen serve: fault {number}", file=sys.stderr)
        traceback.print_exception(error, file=sys.stderr)
        return _error(500, f"This is a fault of the server, not yours. Its log explains fault {number}.")

    return app


def _error(code: int, sentence: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=code, headers=headers)


async def _received(request: Request, folder: Path, limits: Limits) -> Path:
    """Write the body into a file, within the limits, and return its path."""
    place, size = folder / "body", 0
    try:
        with place.open("wb") as stream:
            async with asyncio.timeout(limits.seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limits.body:
                        await asyncio.to_thread(stream.write, chunk)
                    elif size > DRAINED * limits.body:
                        break
    except TimeoutError:
        raise Refused(408, f"The request did not come within {limits.seconds:g} s.") from None
    if size > limits.body:
        raise Refused(413, f"A request has at most {limits.body:,} bytes.")
    return place


def _parsed(place: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(place.read_bytes() or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The request is no JSON: {str(error)[:200]}.") from None
    if not isinstance(tree, dict):
        raise Refused(422, "The request is a JSON object, {...}.")
    return tree


async def _asked_of_cells(request: Request, folder: Path, kind: Any, limits: Limits) -> tuple[Cells | Path, Any]:
    """Return the cells, or the file of them, and what is asked."""
    place = await _received(request, folder, limits)
    if request.headers.get("content-type", "").partition(";")[0] in (H5AD, "application/octet-stream"):
        file = place.rename(folder / "cells.h5ad")
        return file, validated(kind, dict(request.query_params))
    tree = dict(await asyncio.to_thread(_parsed, place))
    cells = validated(Cells, tree.pop("cells", None))
    return cells, validated(kind, tree)


def _renderer(request: Request, folder: Path, *, counts: bool) -> Callable[[AnnData], Response]:
    """Return what makes a response of an answer, as JSON or as a file, as the client accepts."""
    as_file = H5AD in request.headers.get("accept", "")

    def render(adata: AnnData) -> Response:
        if as_file:
            write_h5ad(adata, folder / "answer.h5ad")
            return FileResponse(folder / "answer.h5ad", media_type=H5AD, filename="answer.h5ad")
        told = questions.answer_of(adata, counts=counts)
        if values_in(told) > BLOCK:
            return StreamingResponse(json_pieces(told), media_type="application/json")
        return Response("".join(json_pieces(told)), media_type="application/json")

    return render


def _read(cells: Cells | Path, limits: Limits) -> AnnData:
    adata = read_input(cells) if isinstance(cells, Path) else cells.adata()
    _require_few(adata.n_obs, limits)
    return adata


def _require_few(n: int, limits: Limits) -> None:
    if n > limits.cells:
        raise Refused(413, f"{n:,} cells: this server takes and gives at most {limits.cells:,} at once.")


def _body(kind: Any, cells: bool = False) -> dict[str, Any]:
    """Return what the OpenAPI page says of a request's body."""
    content: dict[str, Any] = {"application/json": {"schema": questions.schema(kind, cells=cells)}}
    if cells:
        content[H5AD] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"content": content, "required": True}}


def serve(model: Model, *, host: str, port: int, limits: Limits, token: str | None, say: Callable[[str], None]) -> None:
    """Answer until a signal ends it.

    Raises
    ------
    UserError
        If others could reach the server and it has no token, or the address cannot be had.
    """
    import uvicorn

    if host not in ("127.0.0.1", "::1", "localhost") and not token:
        raise UserError(
            f"--host {host} lets other machines in: set BGEN_TOKEN to what they must send, or serve at 127.0.0.1."
        )
    config = uvicorn.Config(
        make_app(model, limits, token), host=host, port=port, log_level="warning", timeout_keep_alive=10
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        try:
            place = config.bind_socket()
        except SystemExit:
            raise UserError(f"{host}:{port} cannot be had: another program has it, or you may not use it.") from None
        place.listen(config.backlog)  # who comes before the server is ready waits
        say(f"Serving {model.saved.about.name} at http://{host}:{place.getsockname()[1]} (API: /docs). Ctrl-C ends it.")
        await server.serve(sockets=[place])

    asyncio.run(run())
