"""The examples in the docstrings of what users call: each runs by itself, beside the files that `bgen demo` leaves."""

from __future__ import annotations

import doctest
import inspect
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import bgen
from bgen.api.trained import Trained
from bgen.tasks.load import Model

NO_VERBS = {"counts", "covariates", "decode", "decode_codes", "encode", "expected_shares", "mark_added_genes", "whiten"}
"""What the verbs are made of."""

ONE_BY_ONE = {"Model.interpolate", "Model.read", "Trained"}
"""They name each of the keyword arguments that ``**`` stands for, and attributes."""

KNOWN = {"self", "seed", "progress", "axis"}
"""Arguments whose name and default say enough."""


def examples() -> dict[str, Any]:
    """Everything public that has to have an example, by its name."""
    found = {f"bgen.{name}": getattr(bgen, name) for name in dir(bgen) if name not in ("__version__", "plot")}
    for name, one in vars(bgen.plot).items():
        if inspect.isfunction(one) and one.__module__ == "bgen.plot" and not name.startswith("_"):
            found[f"bgen.plot.{name}"] = one
    for name, one in inspect.getmembers(Model, inspect.isfunction):
        if not name.startswith("_") and name not in NO_VERBS:
            found[f"Model.{name}"] = one
    return {**found, "Model.history": Model.history, "Trained": Trained}


EXAMPLES = examples()


def test_they_are_all_there() -> None:
    verbs = "generate perturb interpolate forecast embed annotate denoise integrate finetune evaluate add_genes save"
    assert {f"Model.{verb}" for verb in verbs.split()} < set(EXAMPLES)
    assert {"bgen.train_perturbation", "bgen.load", "bgen.plot.effect"} < set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_docstring_stands_alone(name: str) -> None:
    """It says what is taken and what may go wrong, and sends nobody to names that are not on the page."""
    text = inspect.getdoc(EXAMPLES[name]) or ""
    assert "Examples\n--------\n>>> " in text
    assert ":func:`bgen.tasks" not in text
    assert ":func:`data_tools" not in text
    if name not in ONE_BY_ONE and callable(EXAMPLES[name]):
        said = {word.strip() for line in text.splitlines() if not line.startswith(" ") for word in line.split(",")}
        assert set(inspect.signature(EXAMPLES[name]).parameters) <= said | KNOWN


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(EXAMPLES[name]) or ""
    if "bgen-demo" in text:
        shutil.copytree(demo.folder, "bgen-demo")
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert example.examples
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(example, out=said.append)
    plt.close("all")
    assert runner.failures == 0, "".join(said)
