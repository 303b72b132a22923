"""Settings of a backbone that do not fit together are refused, all in one message."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from bgen.config.backbone import BackboneConfig


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("mlp", ("none",)),
        ("transformer", ("cells", "none")),
        ("ssm", ("time", "none")),
        ("hybrid", ("time", "cells", "none")),
    ],
)
def test_patterns(name: str, axes: tuple[str, ...]) -> None:
    assert BackboneConfig.model_validate({"name": name}).axes == axes


def test_a_pattern_of_ones_own() -> None:
    assert BackboneConfig.model_validate({"name": "hybrid", "pattern": ["cells", "time"]}).axes == ("cells", "time")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ssm", "pattern": ["time"]}, "only backbone hybrid takes one, not ssm"),
        ({"name": "hybrid", "pattern": []}, "name at least one axis"),
        ({"name": "hybrid", "pattern": ["genes"]}, "'none', 'cells', 'time' or 'tokens'"),
        ({"name": "transformer", "cells": {"mixer": "set_attention"}}, "set_transformer or hybrid"),
        ({"name": "transformer", "width": 36}, "36 is not a multiple of 2 x attention.heads = 8"),
        ({"name": "ssm", "width": 40, "attention": {"heads": 2}}, "64 does not divide the inner width 80"),
        ({"name": "ssm", "mamba2": {"groups": 3}}, "3 does not divide the 8 heads"),
        ({"name": "ssm", "time": {"mixer": "hyena"}}, "hyena needs a regular grid; set it to false"),
        ({"name": "ssm", "time": {"mixer": "s4d"}, "s4d": {"form": "convolutional"}}, "use recurrent"),
        ({"attention": {"longest_period": 0.5}}, "must be above attention.shortest_period"),
        ({"name": "ssm", "time": {"mixer": "mamba3"}}, "'mamba2', 'mamba1', 's4d', 'hyena' or 'attention'"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        BackboneConfig.model_validate(settings)
    assert message in str(caught.value)


def test_all_findings_come_together() -> None:
    settings = {"name": "ssm", "width": 36, "pattern": ["time"], "time": {"mixer": "hyena"}}
    with pytest.raises(ValidationError) as caught:
        BackboneConfig.model_validate(settings)
    for message in ("pattern:", "width:", "time.real_time:"):
        assert message in str(caught.value)


def test_settings_of_mixers_that_are_not_used_need_not_fit() -> None:
    BackboneConfig.model_validate({"name": "transformer", "width": 40, "time": {"mixer": "hyena"}})
    BackboneConfig.model_validate({"name": "ssm", "width": 36, "time": {"mixer": "s4d", "tracked": True}})
