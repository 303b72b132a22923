from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from bgen.config.train import TrainConfig
from bgen.errors import UserError
from bgen.train.engine.deepspeed_json import BatchPlan, batch_plan, deepspeed_config
from bgen.train.engine.engine import _compiled_when_called


def config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("total", "micro", "ranks", "plan"),
    [(512, None, 1, (512, 1)), (512, None, 4, (128, 1)), (512, 64, 2, (64, 4)), (6, 3, 2, (3, 1))],
)
def test_accumulation_follows_from_the_batches(
    total: int, micro: int | None, ranks: int, plan: tuple[int, int]
) -> None:
    assert batch_plan(config(global_batch=total, micro_batch=micro), ranks) == BatchPlan(*plan)


@pytest.mark.parametrize(
    ("total", "micro", "ranks", "advice"),
    [
        (9, None, 2, "train.global_batch=8 or 10."),
        (1, None, 2, "train.global_batch=2."),
        (512, 100, 1, "train.global_batch=500 or 600, or train.micro_batch=64 or 128."),
        (512, 96, 2, "train.global_batch=384 or 576, or train.micro_batch=64 or 128."),
        (510, 16, 4, "train.global_batch=448 or 512."),
        (8, 16, 1, "train.global_batch=16, or train.micro_batch=8."),
    ],
)
def test_an_impossible_pair_names_the_nearest_legal_ones(
    total: int, micro: int | None, ranks: int, advice: str
) -> None:
    with pytest.raises(UserError) as caught:
        batch_plan(config(global_batch=total, micro_batch=micro), ranks)
    assert str(caught.value).endswith(advice)


def test_the_deepspeed_json() -> None:
    tree = deepspeed_config(config(global_batch=512, micro_batch=64, zero=1, precision="bf16", clip=0.5), 2)
    product = tree["train_micro_batch_size_per_gpu"] * tree["gradient_accumulation_steps"] * 2
    assert tree["train_batch_size"] == product == 512
    assert tree["zero_optimization"]["stage"] == 1
    assert tree["gradient_clipping"] == 0.5
    assert tree["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert tree["optimizer"]["params"]["torch_adam"] is True
    assert tree["data_types"]["grad_accum_dtype"] == "fp32"
    assert "bf16" not in tree
    assert "communication_data_type" not in tree
    assert deepspeed_config(config(reduce_precision="bf16"), 1)["communication_data_type"] == "bf16"
    assert "torch_autocast" not in deepspeed_config(config(), 1)


SOURCE = """
def double(x):
    return 2 * x


def both(x):
    return double(x) + double(x)
"""


def test_functions_are_compiled_with_those_beside_them_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("compiled_later")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(SOURCE, vars(module))
    for name in ("double", "both"):
        setattr(module, name, _compiled_when_called(getattr(module, name)))
    early = module.both  # as another module has it that imports it by name
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    assert compiled == []
    assert [early(torch.ones(2)).tolist(), module.both(torch.ones(2)).tolist()] == [[4, 4], [4, 4]]
    assert early(torch.ones(2)).tolist() == [4, 4]
    assert compiled == ["double", "both"]
