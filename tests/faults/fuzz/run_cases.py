"""Run fuzzed cases in one process: ``python run_cases.py KIND SEED FIRST LAST SOURCES WORK``.

SOURCES holds whole inputs: ``cells.h5ad``, ``cells.zarr``, ``store``, ``model``, ``perturb``. Case by case, one of them
is copied below WORK, damaged (:mod:`mutations`), and given to a command. Two lines of ``WORK/KIND.jsonl`` tell it: one
is written before the command runs, so that the last line of a process that died says what killed it; one after it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
import typer.main
from mutations import HOSTILE, Rng, any_file, mutate_h5, mutate_zarr, pick

from bgen.cli.main import main
from data_tools.inputs import hdf5_probe

hdf5_probe.PATIENCE = (
    4.0  # the library hangs on some of these files; one that it is taken to hang on is refused as well
)
typer.main.get_command = functools.cache(typer.main.get_command)  # made of all functions, once

SENSELESS = ["99999999999999999999", "1e400", "0x10", "-0", " ", "a=b", "=", "[", "{a: [}", "--x"]
"""What nobody should type, besides."""

OUTPUTS = ("a/b/c/out", "a/b/c/--")
"""Where commands write: the second, where an option was taken for the value of --out."""

LIMIT = 60.0
"""Seconds that a case may take."""

Command = list[str]


def model_case(folder: Path, sources: Path, rng: Rng) -> tuple[str, Command]:
    """A damaged model directory and a verb."""
    copy_folder(sources / pick(rng, ["model", "model", "perturb"]), folder / "model")
    said = any_file(folder / "model", rng)
    out, cells = str(folder / "out.h5ad"), str(sources / "cells.h5ad")
    commands = [
        ["generate", "MODEL", "--n", "8", "--steps", "2", "--out", out],
        ["embed", "MODEL", cells, "--out", out],
        ["denoise", "MODEL", cells, "--out", out],
        ["perturb", "MODEL", cells, "--perturbation", "A", "--out", out],
        ["evaluate", "MODEL", "--data", str(sources / "store"), "--seeds", "2", "--out", str(folder / "out")],
    ]
    command = pick(rng, [*commands[:1] * 6, *commands[1:4], *commands[1:4], commands[4]])
    return said, [str(folder / "model") if part == "MODEL" else part for part in command]


def store_case(folder: Path, sources: Path, rng: Rng) -> tuple[str, Command]:
    """A damaged store and a command that reads it."""
    copy_folder(sources / "store", folder / "store")
    said = any_file(folder / "store", rng)
    store, out = str(folder / "store"), str(folder / "out")
    quick = ["train.steps=2", "train.global_batch=16", "train.eval_every=0", "track.mlflow=false"]
    train = ["train", "demo/vae", f"data.store={store}", f"out={out}", "track.progress=false", *quick]
    commands = [
        ["data", "info", store],
        ["data", "verify", store],
        ["data", "to-anndata", store, "--out", f"{out}.h5ad"],
        train,
    ]
    return said, pick(rng, [*commands[:3], *commands[:3], *commands[2:]])


def cells_commands(cells: Path, folder: Path, sources: Path, rng: Rng) -> Command:
    """A command that reads a user's cells."""
    out = str(folder / "out.h5ad")
    commands = [
        ["data", "check", str(cells)],
        ["data", "build", str(cells), "--out", str(folder / "out"), "--workers", "0"],
        ["embed", str(sources / "model"), str(cells), "--out", out],
        ["denoise", str(sources / "model"), str(cells), "--out", out],
    ]
    return pick(rng, [*commands[:2], *commands])


def h5ad_case(folder: Path, sources: Path, rng: Rng) -> tuple[str, Command]:
    """A damaged h5ad."""
    shutil.copy(sources / "cells.h5ad", folder / "cells.h5ad")
    said = mutate_h5(folder / "cells.h5ad", rng)
    return said, cells_commands(folder / "cells.h5ad", folder, sources, rng)


def zarr_case(folder: Path, sources: Path, rng: Rng) -> tuple[str, Command]:
    """A damaged AnnData in zarr."""
    copy_folder(sources / "cells.zarr", folder / "cells.zarr")
    said = mutate_zarr(folder / "cells.zarr", rng)
    return said, cells_commands(folder / "cells.zarr", folder, sources, rng)


def command_case(folder: Path, sources: Path, rng: Rng) -> tuple[str, Command]:
    """A command with one or two options, arguments or settings that nobody should give."""
    out = ["--out", str(folder / "out.h5ad")]
    model, cells, store = (str(sources / name) for name in ("model", "cells.h5ad", "store"))
    train = [f"data.store={store}", f"out={folder / 'out'}", "train.steps=2", "train.global_batch=16"]
    train += ["train.eval_every=0", "track.mlflow=false", "track.progress=false"]
    commands: list[Command] = [
        ["generate", model, "--n", "8", "--steps", "2", "--seed", "0", "--library-size", "500", *out],
        ["generate", model, "--n", "8", "--guidance", "2", "--where", "cell_type=type_1", "--noise", "1", *out],
        ["embed", model, cells, "--floor", "0.5", "--counts", "X", "--gene-column", "index", *out],
        ["annotate", model, cells, cells, "--label", "cell_type", "--threshold", "0.5", *out],
        ["integrate", model, cells, "--batch", "batch", "--reference", "batch_1", *out],
        ["denoise", model, cells, "--library-size", "1000", *out],
        ["perturb", str(sources / "perturb"), cells, "--perturbation", "A", "--dose", "1", "--n", "8", *out],
        ["evaluate", model, "--data", store, "--seeds", "2", "--out", str(folder / "out")],
        ["data", "check", cells, "--counts", "X"],
        ["data", "build", cells, "--out", str(folder / "out"), "--splits", "train=0.8,valid=0.2", "--workers", "0"],
        ["data", "simulate", "--preset", "tiny", "--cells", "20", "--seed", "0", *out],
        ["data", "info", store],
        ["train", "demo/vae", *train, "train.learning_rate=0.001", "vae.latent=4", "vae.kl_weight=1"],
        ["config", "check", "vae"],
        ["config", "show", "demo/vae", "train.steps=5"],
        ["plan", "vae", "train.steps=5"],
        ["export", str(sources / "run"), *out],
    ]
    command = list(pick(rng, commands))
    if command[0] == "evaluate":  # the model tells its scores
        copy_folder(sources / "model", folder / "model")
        command[1] = str(folder / "model")
    said = []
    for _ in range(int(rng.integers(1, 3))):
        at = int(rng.integers(1, len(command)))
        value = str(
            pick(rng, [*HOSTILE, "99999999999999999999", "1e400", "0x10", "-0", " ", "a=b", "=", "[", "{a: [}", "--x"])
        )
        way = pick(rng, ["value", "drop", "repeat", "setting"])
        part = command[at]
        if str(folder) in part and way != "drop":
            continue  # what it writes stays where it is looked for
        if "=" in part and way in ("value", "setting"):
            name, old = part.split("=", 1)
            command[at] = f"{name}={value}" if rng.random() < 0.7 else f"{value}={old}"
        elif way == "value" and not part.startswith("--"):
            command[at] = value
        elif way == "drop":
            del command[at]
        else:
            command.insert(at, part)
        said.append(f"{way} at {at}")
    return ", ".join(said), [part.replace("\0", "") for part in command]


CASES: dict[str, Callable[[Path, Path, Rng], tuple[str, Command]]] = {
    "model": model_case,
    "store": store_case,
    "h5ad": h5ad_case,
    "zarr": zarr_case,
    "command": command_case,
}


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder so that its copy can be written."""
    shutil.copytree(source, target)


def fingerprint(folder: Path, leave: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what every file and link below a folder holds, but for those that begin so."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith(leave) or "__pycache__" in name:
            continue
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return what changes of every file below a folder when it is written, at a fraction of the cost of its bytes."""
    found = {}
    for path in folder.rglob("*"):
        told = path.lstat()
        if not stat.S_ISDIR(told.st_mode) and "__pycache__" not in path.parts:
            found[str(path)] = told.st_mode, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns
    return found


def call(command: Command) -> tuple[int | str, str, str]:
    """Run a command line in this process; return its exit code, and what it printed as output and as errors."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["bgen", *command]
    code: int | str = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    return code, out.getvalue(), err.getvalue()


def peak_memory() -> float:
    """Return the most memory that this process has held since the last call, in GB, and begin anew."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(re.search(r"VmHWM:\s+(\d+)", text)[1])  # type: ignore[index]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak / 1e6


def invalid(folder: Path, command: Command) -> str | None:
    """Return what is wrong with the result of a command that says that it succeeded; None if nothing is."""
    out = folder / "out.h5ad"
    if command[0] in ("generate", "perturb", "denoise", "embed") and "--help" not in command:
        if not out.exists():
            return f"no {out.name}"
        made = anndata.read_h5ad(out)
        arrays = [made.X] if command[0] in ("generate", "perturb") else []
        arrays += list(made.obsm.values()) if command[0] == "embed" else []
        arrays += [made.layers["denoised"]] if command[0] == "denoise" else []
        for array in arrays:
            values = array.data if sp.issparse(array) else np.asarray(array)
            if command[0] == "denoise":  # genes that the model does not know have no value
                values = values[:, ~np.isnan(values).all(0)]
            if not np.isfinite(values).all():
                return "values that are not finite"
            if command[0] != "embed" and values.size and values.min() < 0:
                return "negative counts"
    return None


def judge(command: Command, code: int | str, out: str, err: str, wrong: str | None) -> str | None:
    """Return what is wrong with the way a command ended; None: success, or one message and exit code 2."""
    if isinstance(code, str):
        return code
    if "Traceback" in err:
        return "a traceback"
    if code == 0:
        return wrong
    if code != 2:
        return f"exit code {code}"
    told = len(re.findall(r"^error", err, re.M)) + err.count("─ Error ─")
    findings = command[:2] in (["data", "check"], ["data", "build"]) and out  # a table of them is printed instead
    usage = out.lstrip().startswith("Usage:")  # of a group that was given no command
    if told != 1 and not findings and not usage:
        return "no single message"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", re.sub(r"\x1b\[[0-9;]*m", "", err)):
        return "control characters"
    return None


def run(kind: str, seed: int, first: int, last: int, sources: Path, work: Path) -> None:
    """Run the cases ``first`` to ``last - 1``."""
    log = (work / f"{kind}.jsonl").open("a", encoding="utf-8")
    before = stamps(sources)
    os.environ["COLUMNS"] = "200"
    for number in range(first, last):
        rng = np.random.default_rng([seed, sorted(CASES).index(kind), number])
        around = work / f"{kind}-{number}"
        folder = around / "a" / "b" / "c"
        folder.mkdir(parents=True)
        os.chdir(folder)
        try:
            said, command = CASES[kind](folder, sources, rng)
        except Exception as error:  # the damage could not be done: nothing to try
            log.write(json.dumps({"case": number, "skipped": repr(error)}) + "\n")
            shutil.rmtree(around, ignore_errors=True)
            continue
        log.write(json.dumps({"case": number, "damage": said, "command": command}) + "\n")
        log.flush()
        inputs = fingerprint(around, leave=OUTPUTS)
        peak_memory()
        begin = time.perf_counter()
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        code, out, err = call(command)
        faulthandler.cancel_dump_traceback_later()
        seconds, memory = time.perf_counter() - begin, peak_memory()
        fault = judge(command, code, out, err, invalid(folder, command) if code == 0 else None)
        touched = [item for item in fingerprint(around, leave=OUTPUTS).items() if item not in inputs.items()]
        if command[0] == "evaluate" and code == 0:  # the model and its card tell its scores
            touched = [item for item in touched if not item[0].endswith(("model/metrics.json", "model/README.md"))]
        if touched:
            fault = f"touched {sorted(name for name, _ in touched)[:5]}"
        if stamps(sources) != before:
            fault = "changed an input"
        row = {"case": number, "code": code, "seconds": round(seconds, 2), "memory_gb": round(memory, 3)}
        log.write(json.dumps(row | {"fault": fault, "err": err[-2000:]}) + "\n")
        log.flush()
        os.chdir(work)
        shutil.rmtree(around, ignore_errors=True)


if __name__ == "__main__":
    kind, seed, first, last, sources, work = sys.argv[1:]
    run(kind, int(seed), int(first), int(last), Path(sources), Path(work))
