"""Model directories from anywhere: whatever their files hold, one clear error, and nothing larger than they are."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bgen.config.flow import FlowConfig, MemberSizes, SampleConfig
from bgen.config.vae import VAEConfig
from bgen.errors import UserError
from bgen.hub.about import About, EffectOf, Perturbation
from bgen.hub.contents import build_like
from bgen.hub.directory import ColumnInfo, SavedModel, load_directory, save_model
from bgen.models.generators.average_effects import AverageEffects
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE

MODELS = Path(__file__).parent / "fixtures_0_1_0"


def copied(kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODELS / kind, tmp_path / "model"))


def put(file: Path, where: str, value: Any) -> None:
    """Set a value at a dotted path of a JSON file."""
    tree = json.loads(file.read_text())
    *path, last = where.split(".")
    part = tree
    for key in path:
        part = part.setdefault(key, {})
    part[last] = value
    file.write_text(json.dumps(tree))


LARGE = (10_000_000, 10**13)


@pytest.mark.parametrize(
    ("kind", "where", "value"),
    [
        *(("vae", f"vae.{name}", size) for name in ("blocks", "latent", "hidden") for size in LARGE),
        *(("flow", f"flow.backbone.{name}", size) for name in ("layers", "width") for size in LARGE),
        *(("course", f"flow.backbone.{name}", size) for name in ("layers", "time.tokens") for size in LARGE),
        ("annotator", "about.labels", "a" * 100),
        ("vae", "n_genes", 10**13),
        ("vae", "n_genes", "many"),
        ("vae", "vae.likelihood", ["nb"]),
        ("vae", "vae", []),
        ("vae", "about", []),
        ("vae", "about.version", [[1]]),
        ("vae", "kind", "other"),
        ("vae", "kind", {}),
        ("vae", "covariates", 5),
        ("vae", "covariates", ["nothing"]),
        ("flow", "conditions", [["a"]]),
        ("flow", "sample", {"steps": -1}),
        ("flow", "sample", "heun"),
        ("flow", "sample", {"tolerance": "nan"}),
        ("flow", "flow", None),
        ("flow", "flow.backbone.name", 7),
    ],
)  # fmt: skip
def test_settings_that_the_weights_do_not_have(kind: str, where: str, value: Any, tmp_path: Path) -> None:
    folder = copied(kind, tmp_path)
    put(folder / "config.json", where, value)
    with pytest.raises(UserError):
        load_directory(folder)


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small flow along perturbations, with average effects."""
    sizes = MemberSizes(members=2, labels=3, largest=1, names=4, vector=2, amount=None, forget=0.1)
    config = FlowConfig(source="neighbours", backbone={"width": 16, "layers": 1})
    flow = LatentFlow(config, VAE(VAEConfig(latent=3, hidden=8, blocks=1), 4, {}), {}, {}, {"guide": sizes})
    labels = torch.tensor([[-1], [0], [1]])
    flow.conditions.member_embeddings["guide"].describe(torch.randn(4, 2), labels, labels, 1.0)
    flow.averages = AverageEffects.empty(2, 4, contexts=1, own=1)
    facts = Perturbation(
        perturbations=["a", "b"], column="guide", effects=[EffectOf(set=[x], dose=None) for x in "ab"], own=1
    )
    facts = facts.model_copy(update={"contexts": [["x"]]})
    folder = tmp_path_factory.mktemp("screen") / "model"
    saved = SavedModel(
        module=flow,
        genes=pd.DataFrame({"id": list("pqrs"), "symbol": list("pqrs"), "cells": 1}),
        columns={"guide": ColumnInfo("perturbation", "category", ["none", "a", "b"])},
        combinations=pd.DataFrame({"guide": [0, 1, 2], "cells": [3, 4, 5]}),
        sample=SampleConfig(steps=3),
        about=About(name="test", organism="synthetic", perturbation=facts),
    )
    save_model(saved, folder)
    assert load_directory(folder).kind == "flow"
    return folder


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(
            (f"sets.guide.{name}", size)
            for name in ("members", "labels", "largest", "names", "vector")
            for size in LARGE
        ),
        *((f"about.perturbation.pooling.{name}", size) for name in ("features", "directions") for size in LARGE),
        *(("about.perturbation.own", size) for size in LARGE),
        ("about.perturbation.network", {"components": 10**13, "edges": 1, "edges_in_file": 1}),
        ("about.perturbation.effects", "a" * 100),
        ("about.perturbation.perturbations", ["a"]),
        ("about.perturbation.named", ["x"]),
        ("about.perturbation", None),
        ("sets", {}),
        ("sets", {"other": {}}),
        ("sets.guide.amount", "nothing"),
    ],
)
def test_perturbations_that_the_weights_do_not_have(where: str, value: Any, screen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(screen, tmp_path / "model"))
    put(folder / "config.json", where, value)
    with pytest.raises(UserError):
        load_directory(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("label_own", lambda t: t + 1, "label_own of guide: 0 to 2 are not within -1 to 1"),
        ("label_own", lambda t: t - 1, "label_own of guide: -2"),
        ("label_vector", lambda t: t + 3, "label_vector of guide"),
        ("typical_amount", lambda t: t * 0, "the typical amount of guide is not positive"),
        ("own_of", lambda t: t + 1, "contexts of effects: 1 to 1 are not within 0 to 0"),
        ("averages.general", lambda t: t * torch.nan, "NaN or infinite"),
    ],
)
def test_numbers_of_members_and_effects_that_lead_nowhere(
    name: str, change: Any, message: str, screen: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(screen, tmp_path / "model"))
    spoilt(name, change, folder)
    with pytest.raises(UserError, match=f"damaged: .*{message}"):
        load_directory(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", "[]"),
        ("config.json", "\x00"),
        ("preprocessing.json", "{}"),
        ("preprocessing.json", '{"genes_sha256": "x", "columns": {"a": {"role": "a", "kind": "list"}}}'),
        ("preprocessing.json", '{"genes_sha256": "x", "columns": []}'),
        ("genes.csv", "id,symbol,cells\n\n"),
        ("genes.csv", "nothing\n"),
        ("genes.csv", '"'),
        ("conditions.csv", ""),
        ("conditions.csv", "cells\nmany\n"),
        ("conditions.csv", "cells\n-5\n"),
        ("conditions.csv", "cell_type,cells\n99999,5\n"),
        ("conditions.csv", "nothing,cells\n0,5\n"),
    ],
)
def test_files_that_are_damaged(file: str, text: str, tmp_path: Path) -> None:
    folder = copied("flow", tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=f"{file}|not a gene table|damaged"):
        load_directory(folder)


def spoilt(name: str, change: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    found = next(key for key in state if key.endswith(name))
    state[found] = change(state[found])
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("encoder.weight", lambda t: t.index_fill(0, torch.tensor([0]), torch.nan), "NaN or infinite"),
        ("log_theta", lambda t: t + torch.inf, "NaN or infinite"),
        ("latent_std", lambda t: t * 0, "not positive"),
        ("log_library_range", lambda t: torch.tensor([50.0, 60.0]), "no range of log counts"),
        ("log_library_range", lambda t: torch.tensor([9.0, 3.0]), "no range of log counts"),
        ("log_library_range", lambda t: t * torch.nan, "no range of log counts"),
        ("encoder.weight", lambda t: t[:-1].contiguous(), "has the shape"),
    ],
)
def test_weights_that_cannot_be_used(name: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = copied("vae", tmp_path)
    spoilt(name, change, folder)
    with pytest.raises(UserError, match=f"damaged: .*{message}"):
        load_directory(folder)


def test_loading_draws_no_random_numbers_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    load_directory(MODELS / "vae")
    one = torch.rand(3)
    torch.manual_seed(0)
    load_directory(MODELS / "vae")
    assert torch.equal(one, torch.rand(3))


def test_a_model_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    save_model(load_directory(MODELS / "vae"), tmp_path / "model")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_the_card_shows_names_and_follows_none(tmp_path: Path) -> None:
    saved = load_directory(MODELS / "flow")
    saved.about = saved.about.model_copy(
        update={"name": "<img src=x onerror=alert(1)>", "sources": ["![x](http://x/y.png)", "a|b\x1b[2J"]}
    )
    save_model(saved, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "<img" not in card
    assert "![x]" not in card
    assert "\x1b" not in card
    assert "onerror" in card
    assert "x/y.png" in card


class Reading(nn.Module):
    """A part that reads a number as it is made, which no tensor without memory can give."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.first = self.weight[0].item()


def test_a_part_that_needs_memory_to_be_made_is_bounded_by_the_file() -> None:
    assert build_like(lambda: Reading(5), {"weight": (5,)}).first == 1.0
    with pytest.raises(ValueError, match="ask for 6 numbers in one tensor"):
        build_like(lambda: Reading(6), {"weight": (5,)})
