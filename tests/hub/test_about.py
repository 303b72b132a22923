"""What a model says of itself: read back as it was written, also by older versions; refused in words if newer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bgen.errors import UserError
from bgen.hub.about import (
    About,
    Annotation,
    EffectOf,
    EffectPooling,
    Finetuning,
    Parent,
    Perturbation,
    RegulatoryNetwork,
    Training,
    read_about,
)
from bgen.hub.card import held_out_lines

FILE = Path("model/config.json")
SCREEN = About(
    name="screen",
    organism="human",
    control="none",
    cells=7,
    finetuning=Finetuning(task="perturb", mode="head", parent=Parent(name="blood", fingerprint="f" * 64)),
    perturbation=Perturbation(
        perturbations=["A", "B"],
        effects=[EffectOf(set=["A"], dose=None), EffectOf(set=["A", "B"], dose=0.1)],
        contexts=[["B", "1"]],
        own=2,
        pooling=EffectPooling(width=3.5, flow=0.4),
        network=RegulatoryNetwork(components=4, edges=3, edges_in_file=9),
    ),
)
OLD: dict[str, Any] = {
    "name": "screen",
    "organism": "human",
    "units": {"time": "hours"},
    "roles": {"batch": "run"},
    "sources": ["7 cells of the user"],
    "cells": 7,
}


def test_it_reads_back_as_it_was_written() -> None:
    tree = json.loads(json.dumps(SCREEN.as_json()))
    assert read_about(tree, FILE) == SCREEN
    assert read_about(tree, FILE).as_json() == tree
    assert tree["version"] == 2
    assert "annotation" not in tree
    assert tree["perturbation"]["effects"][0] == {"set": ["A"], "dose": None}


@pytest.mark.parametrize(
    ("more", "group", "expected"),
    [
        (
            {"store": "f0", "split": "train", "steps": 9, "seed": 0, "trajectories": None, "times": [0.0, 6.0]},
            "training",
            Training(store="f0", split="train", steps=9, seed=0),
        ),
        (
            {"task": "time", "mode": "full", "parent": {"name": "blood", "fingerprint": "ab"}},
            "finetuning",
            Finetuning(task="time", mode="full", parent=Parent(name="blood", fingerprint="ab")),
        ),
        ({"label": "type", "labels": ["B", "T"]}, "annotation", Annotation(label="type", labels=["B", "T"])),
        (
            {"perturbations": ["A"], "effects": [{"set": ["A"], "dose": 1.0}]},  # as before strata
            "perturbation",
            Perturbation(perturbations=["A"], effects=[EffectOf(set=["A"], dose=1.0)]),
        ),
    ],
)
def test_fields_of_the_first_version_find_their_group(more: dict[str, Any], group: str, expected: object) -> None:
    read = read_about({**OLD, **more}, FILE)
    assert getattr(read, group) == expected
    assert [name for name in ("training", "finetuning", "annotation", "perturbation") if getattr(read, name)] == [group]
    assert (read.units, read.roles, read.times) == ({"time": "hours"}, {"batch": "run"}, more.get("times", []))
    assert read.as_json()["version"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, r"about\.version is 3.*A newer bgen wrote model/config\.json"),
        ({"tokens": 5}, r"about\.tokens is nothing that this bgen knows.*newer bgen"),
        ({"training": {"store": "", "split": "", "steps": 1, "seed": 0, "lr": 1}}, r"about\.training\.lr is nothing"),
        ({"annotation": {"label": "type"}}, r"damaged: about\.annotation\.labels is missing"),
        ({"cells": "many"}, r"damaged: about\.cells is wrong"),
    ],
)
def test_what_is_not_known_or_wrong_is_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_about({"version": 2, **OLD, **change}, FILE)


def test_scores_of_an_older_protocol_are_read_and_shown() -> None:
    """What a model directory says of perturbations that were held out under perturbation-v3: no headline, a slope."""
    figure = {"mean": 0.3, "interval": [0.2, 0.4], "by_seed": [0.3], "by_perturbation": [0.3]}
    rows = {"model": {"pearson": figure, "slope": figure}, "ceiling": {"pearson": figure}}
    old = {"protocol": "perturbation-v3", "perturbations": ["A"], "rows": rows, "words": ["train mean: better."]}
    tree = SCREEN.as_json()
    tree["perturbation"]["held_out"] = old
    about = read_about(json.loads(json.dumps(tree)), FILE)
    assert about.as_json() == tree
    assert about.perturbation is not None
    assert about.perturbation.held_out is not None
    card = "\n".join(held_out_lines(about.perturbation.held_out))
    assert "Protocol `perturbation-v3` on 1 held-out perturbations" in card
    assert "| model | 0.3 | 0.3 |" in card
    assert "| ceiling | 0.3 |  |" in card
    assert "train mean: better" in card
    new = about.perturbation.held_out.model_copy(update={"headline": "The model explains all."})
    assert held_out_lines(new)[0] == "The model explains all."
