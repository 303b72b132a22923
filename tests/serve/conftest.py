"""What tests of servers share: a model that answers every question."""

from __future__ import annotations

from typing import Any

import pytest

from bgen.tasks.load import Model, load_model


@pytest.fixture(scope="session")
def model(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One that generates, embeds, annotates and perturbs."""
    return load_model(demo.model).finetune(
        demo.cells,
        tmp_path_factory.mktemp("tuned") / "out",
        task="perturb",
        mode="head",
        perturbation="perturbation",
        control="control",
        overrides=["flow.patterns.noise=0.5", "train.steps=2", "train.global_batch=64", "track.mlflow=false"],
    )
