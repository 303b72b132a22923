"""The environment variables of a job, from ``launch/environment.yaml``, the one place where they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Variable:
    """One entry of the file.

    Attributes
    ----------
    name
        Its name; ``NCCL_*`` stands for all names that begin so.
    value
        What it is set to, unless it is set already; None: it is only handed on.
    why
        What it does, in a line.
    secret
        Whether it must never be written into a file that is kept.
    host
        Whether it only means something on hosts with the same file system.
    """

    name: str
    value: str | None = None
    why: str = ""
    secret: bool = False
    host: bool = False


def read_environment(path: Path, device: str) -> list[Variable]:
    """Read the file; ``{{device}}`` in a value stands for ``device``."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    variables = [Variable(**entry) for entry in entries]
    for variable in variables:
        assert variable.value is None or "*" not in variable.name, variable
        assert not (variable.secret and variable.value is not None), variable
    return [
        Variable(v.name, v.value.replace("{{device}}", device) if v.value else v.value, v.why, v.secret, v.host)
        for v in variables
    ]


def forwarded(variables: Sequence[Variable]) -> str:
    """Return a regular expression (of Python and of ``grep -E``) that matches the variables' names."""
    return "|".join(re.escape(v.name).replace(r"\*", "[A-Za-z0-9_]*") for v in variables)
