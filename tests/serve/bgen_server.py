"""`bgen serve` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

H5AD = "application/x-hdf5"


@dataclass
class Server:
    address: str
    process: subprocess.Popen[str]

    def ask(self, path: str, content: Any = None, **headers: str) -> tuple[int, Any]:
        """Return code and answer; JSON if it is such."""
        body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        request = urllib.request.Request(self.address + path, body, given)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                code, told, kind = answer.status, answer.read(), answer.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            code, told, kind = error.code, error.read(), error.headers["Content-Type"]
        return code, json.loads(told) if kind == "application/json" else told


def start(model: Path, *options: object, python: str = sys.executable, **variables: str) -> Server:
    command = [python, "-m", "bgen", "serve", str(model), "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables})
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"at (http://\S+)", said)):
        line = process.stderr.readline()
        assert line, f"it ended: {said}"
        said += " " + line.strip()
    return Server(found[1], process)


@contextmanager
def running(model: Path, *options: object, python: str = sys.executable, **variables: str) -> Iterator[Server]:
    made = start(model, *options, python=python, **variables)
    try:
        yield made
    finally:
        made.process.terminate()
        _, said = made.process.communicate(timeout=120)
    assert "Traceback" not in said
