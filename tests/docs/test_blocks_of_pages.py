"""All code on all pages is run by `run_blocks.py --all`, or says why not, and then its commands can be read."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from bgen.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
INDENTED = re.compile(
    r"^(?: {4}|\t)(?:bgen|pip|python3?|pytest|import|from|git|curl|kubectl|torchrun|export) .*$", re.MULTILINE
)
FENCED = re.compile(r"^([ \t]*)```.*?^\1```", re.MULTILINE | re.DOTALL)


def load_runner() -> Any:
    spec = importlib.util.spec_from_file_location("run_blocks", Path(__file__).with_name("run_blocks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


RUNNER = load_runner()
PAGES = [page.relative_to(ROOT).as_posix() for page in RUNNER.all_pages()]


def outside_blocks(page: str) -> str:
    return FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))


def not_run() -> list[Any]:
    """The commands of bgen that stand in blocks which are not run, each with its page and line."""
    found = []
    for page in PAGES:
        for block in RUNNER.blocks_of((ROOT / page).read_text(encoding="utf-8")):
            if block.reason is None or block.language != "bash":
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                if found_one := re.search(r"(?:^|&& )(?:\w+=\S* )*(bgen .*?)(?: &&|$)", re.sub(r"\s#.*$", "", line)):
                    found.append(pytest.param(found_one[1], id=f"{page}: {found_one[1][:50]}"))
    return found


def test_ci_runs_all_pages() -> None:
    assert "run_blocks.py --all\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert {"README.md", "CONTRIBUTING.md", "bgen/tasks/questions.md", "bgen/bench/README.md"} < set(PAGES)
    assert (
        PAGES.index("bgen/tasks/README.md")
        < PAGES.index("bgen/tasks/cells/README.md")
        < PAGES.index("configs/README.md")
    )


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_that_are_run(page: str) -> None:
    assert INDENTED.findall(outside_blocks(page)) == []
    languages = set(re.findall(r"^[ \t]*```(\S+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert languages <= {*RUNNER.RUN, "bibtex", "text"}
    RUNNER.blocks_of((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", not_run())
def test_a_command_that_is_not_run_names_verbs_and_options_that_there_are(command: str) -> None:
    verb: Any = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    while hasattr(verb, "commands"):
        verb = verb.commands[words.pop(0)]
    verb.make_context(verb.name, words)  # reads the words, and runs nothing


def test_an_indented_command_is_seen() -> None:
    assert INDENTED.findall("Text\n\n    bgen demo\n") == ["    bgen demo"]
