"""Run the command blocks of pages, verbatim and in order: ``python tests/docs/run_blocks.py README.md ...``, or --all.

Every page gets a folder of its own, one shell (``bash -euo pipefail``) and one Python namespace, so that a block finds
what the blocks before it left there. What is run:

- bash blocks in the shell, python blocks in the namespace;
- yaml blocks are configurations: ``bgen config check`` reads them. The first line ``# name.yaml`` also gives the file
  its name for the blocks that follow.

Comments of the page, which its readers do not see, speak to this script:

- ``<!-- not run: reason -->`` directly before a block: it cannot run here, and the reason is printed;
- ``<!-- setup: commands -->``: bash commands that are run in their place, such as putting cells where a block looks for
  them. ``$DOCS`` is the folder of this script; ``$PAGES`` holds the pages' folders, named as the pages without ``.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent.parent

RUN = ("bash", "python", "yaml")
MISNAMED = {"sh": "bash", "shell": "bash", "console": "bash", "zsh": "bash", "py": "python", "yml": "yaml"}

PARTS = re.compile(
    r"^<!--\s*(?P<word>setup|not run)\b:?(?P<said>.*?)-->"
    r"|^(?P<indent>[ \t]*)(?P<fence>`{3,})(?P<language>[\w+-]*)[^\n`]*\n(?P<text>.*?)^[ \t]*(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
NAMED = re.compile(r"#\s*([\w-]+\.yaml)\b")

READ_AND_RUN = """
import sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    path, page, done = line.rstrip("\\n").split("\\t")
    exec(compile(open(path, encoding="utf-8").read(), page, "exec"), names)
    print(done, flush=True)
"""
"""What the Python of a page does."""


class PageError(Exception):
    """A page that this script cannot read as it is meant; says where."""


@dataclass(frozen=True)
class Block:
    """A block of a page, or a set-up comment.

    Attributes
    ----------
    line
        Number of the first line of the text in the page, from 1 on.
    language
        One of :data:`RUN`, or "setup".
    reason
        Why it is not run; None: it is run.
    """

    line: int
    language: str
    text: str
    reason: str | None = None


def blocks_of(text: str) -> list[Block]:
    """Return the blocks of a page and its set-up comments, in order.

    Raises
    ------
    PageError
        If a reason is missing, or belongs to no block; a block does not end; or a language has another name here.
    """
    found: list[Block] = []
    reason: tuple[int, str] | None = None  # where its comment ends, and what it says
    for match in PARTS.finditer(text):
        line = line_of(text, match.start())
        if reason is not None and (match["word"] or text[reason[0] : match.start()].strip()):
            raise PageError(f"line {line}: the comment 'not run' before it stands directly before no block")
        if match["word"] == "setup":
            found.append(Block(line, "setup", match["said"].strip() + "\n"))
        elif match["word"]:
            if not match["said"].strip():
                raise PageError(f"line {line}: 'not run' without a reason")
            reason = match.end(), " ".join(match["said"].split())
        else:
            language = match["language"]
            if language in MISNAMED:
                raise PageError(f"line {line}: write ```{MISNAMED[language]}, not ```{language}: it would not be run")
            if language in RUN:
                indent = match["indent"]
                lines = [each.removeprefix(indent) for each in match["text"].splitlines(keepends=True)]
                found.append(Block(line + 1, language, "".join(lines), reason and reason[1]))
            elif reason is not None:
                raise PageError(f"line {line}: only {', '.join(RUN)} are run, so this needs no 'not run'")
            reason = None
    if reason is not None:
        raise PageError(f"line {line_of(text, reason[0])}: 'not run' stands directly before no block")
    if left := FENCE.search(PARTS.sub(lambda match: re.sub("[^\n]", "", match[0]), text)):
        raise PageError(f"line {line_of(text, left.start())}: a block that does not end")
    return found


def all_pages() -> list[Path]:
    """Return the pages of the repository in the order in which they are run: some need what earlier ones made."""
    folders = ("bgen", "configs", "data_tools", "launch")
    below = (page for folder in folders for page in (REPOSITORY / folder).rglob("*.md"))
    return [*sorted(REPOSITORY.glob("*.md"), reverse=True), *sorted(below)]


def line_of(text: str, place: int) -> int:
    """Return the number of the line, from 1 on, that holds the character at ``place``."""
    return text.count("\n", 0, place) + 1


class Session:
    """A process that runs files one after the other and keeps what they leave behind, such as variables.

    Parameters
    ----------
    command
        Reads lines from its input: which file to run, and what to print when it is done.
    folder
        Where it starts.
    """

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    def run(self, request: str, done: str, limit: float) -> tuple[bool, str]:
        """Hand in a line; return whether all went well, and what was printed.

        Parameters
        ----------
        request
            Line for the process.
        done
            What it prints, on a line of its own, when that went well.
        limit
            Seconds; then the process is killed with all that it started.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(limit, self.kill)
        timer.start()
        said: list[str] = []
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                before, is_done, _ = line.partition(done)
                said.append(before)
                if is_done:
                    return True, "".join(said)
        except BrokenPipeError:
            said.append("The process had ended.\n")
        finally:
            late = not timer.is_alive()
            timer.cancel()
        said.append(f"Killed after {limit:g} s.\n" if late else f"Exit code {self.process.wait()}.\n")
        return False, "".join(said)

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Page:
    """A page while it runs.

    Parameters
    ----------
    name
        The page as it is called in messages.
    folder
        The page's own, empty.
    environment
        Of all its processes.
    """

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.folder = name, folder
        self._sources = folder.parent / f".{folder.name}.blocks"
        for each in (folder, self._sources):
            each.mkdir(parents=True)
        self._commands = {
            "bash": ["bash", "-euo", "pipefail"],
            "python": [sys.executable, "-u", "-c", READ_AND_RUN],
        }
        self._sessions: dict[str, Session] = {}
        self._environment = environment

    def run(self, block: Block, limit: float) -> tuple[bool, str]:
        """Run a block; return whether it went well, and what it printed."""
        text, kind = block.text, "python" if block.language == "python" else "bash"
        if block.language == "yaml":
            named = NAMED.match(text)
            file = named[1] if named else f"line_{block.line}.yaml"
            (self.folder / file).write_text(text, encoding="utf-8")
            text = f"bgen config check {file}\n"
        source = self._sources / f"line_{block.line}.{kind}"
        # Empty lines in front, so that messages name the line of the page.
        source.write_text("\n" * (block.line - 1) + text, encoding="utf-8")
        if kind not in self._sessions:
            self._sessions[kind] = Session(self._commands[kind], self.folder, self._environment)
        done = f"done: {self.name}, line {block.line}"
        request = f"{source}\t{self.name}\t{done}"
        if kind == "bash":
            request = f"set -x; . '{source}' </dev/null; {{ set +x; }} 2>/dev/null; echo '{done}'"
        return self._sessions[kind].run(request, done, limit)

    def close(self) -> None:
        """End its processes."""
        for session in self._sessions.values():
            session.kill()
            session.process.wait()


def run_page(page: Path, pages: Path, limit: float) -> Iterator[tuple[Block, bool, str, float]]:
    """Run a page up to its first block that fails: each block, whether it went well, what it printed, and seconds."""
    page = page.resolve()
    name = str(page.relative_to(REPOSITORY)) if page.is_relative_to(REPOSITORY) else page.name
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DOCS": str(DOCS),
        "PAGES": str(pages),
    }
    running = Page(name, pages / name.removesuffix(".md"), environment)
    try:
        for block in blocks_of(page.read_text(encoding="utf-8")):
            if block.reason is not None:
                yield block, True, "", 0.0
                continue
            begin = time.monotonic()
            good, said = running.run(block, limit)
            yield block, good, said, time.monotonic() - begin
            if not good:
                return
    finally:
        running.close()


def main() -> int:
    """Run the pages that are given; the exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(description="Run the command blocks of pages, verbatim and in order.")
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--all", action="store_true", help="all pages of the repository")
    parser.add_argument("--limit", type=float, default=2400, help="most seconds of one block (default 2400)")
    parser.add_argument("--keep", type=Path, help="new folder for what the pages make (default: one that is removed)")
    options = parser.parse_args()
    if options.all == bool(options.pages):
        parser.error("name pages, or give --all")
    given = [page.relative_to(REPOSITORY) for page in all_pages()] if options.all else options.pages
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        failed = [page for page in given if not _report(page, folder, options.limit)]
    if failed:
        print(f"Failed: {', '.join(map(str, failed))}")
    return 1 if failed else 0


def _report(page: Path, pages: Path, limit: float) -> bool:
    """Run a page and print a line for each block; False if one of them, or the page itself, is wrong."""
    run, total = 0, 0.0
    try:
        for block, good, said, seconds in run_page(page, pages, limit):
            first = next((line for line in block.text.splitlines() if line.strip()), "")
            where = f"{page}:{block.line}"
            if block.reason is not None:
                print(f"{where:<32} not run: {block.reason}", flush=True)
                continue
            print(f"{where:<32} {seconds:6.1f} s  {block.language:<6}  {first[:80]}", flush=True)
            run, total = run + 1, total + seconds
            if not good:
                print(f"{said}{where}: this block failed:\n{block.text}", flush=True)
                return False
    except PageError as error:
        print(f"{page}, {error}")
        return False
    print(f"{page}: {run} run in {total:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
