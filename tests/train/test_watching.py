"""What helps to find a fault or a slow step: the first module that is not finite, and a profile."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from prefork import python
from torch import Tensor, nn
from toy import ToyModel, ToyStage, run, toy_config

from bgen.track import record
from bgen.train.diagnose.not_finite import first_not_finite
from bgen.train.trainer import Trainer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.inner(x).sum(1).log()}


def test_the_innermost_module_is_named_and_the_formula_where_no_module_is_to_blame() -> None:
    net, x = Net(), torch.ones(3, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    assert first_not_finite(net, lambda: net(x)) is None
    assert first_not_finite(net, lambda: net(-9 * x)) is None  # what is negative, ReLU takes away
    with torch.no_grad():
        net.inner[2].bias.fill_(-100.0)  # type: ignore[union-attr,operator]
    assert first_not_finite(net, lambda: net(x)) == "Net itself"  # the logarithm of a negative number
    with torch.no_grad():
        net.inner[1][0].weight.fill_(torch.inf)  # type: ignore[index,union-attr]
    assert first_not_finite(net, lambda: net(x)) == "inner.1.0 (Linear)"
    assert not any(part._forward_hooks for part in net.modules())


def test_a_run_names_the_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path / "run", {"steps": 5, "eval_every": 0})
    stage = ToyStage(config)
    assert isinstance(stage.module, ToyModel)
    inside = stage.module.body[2]

    def spoiled(part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output * torch.nan if spoil[0] else None

    spoil = [False]
    inside.register_forward_hook(spoiled)
    stage.module.register_forward_pre_hook(lambda _, args: spoil.__setitem__(0, args[0].step in (1, 2)))
    Trainer(config, stage).fit()
    skipped = [row for row in record.read(tmp_path / "run" / "record.jsonl") if row.get("event") == "skipped"]
    assert [(row["step"], row.get("first")) for row in skipped] == [(2, "body.2 (GELU)"), (3, "body.2 (GELU)")]
    assert "first in body.2 (GELU)" in capsys.readouterr().err


def test_a_profile_holds_the_steps_of_its_window_and_changes_no_loss(tmp_path: Path) -> None:
    plain, _ = run(toy_config(tmp_path / "plain", {"steps": 8, "eval_every": 0}))
    result, _ = run(toy_config(tmp_path / "run", {"steps": 8, "eval_every": 0, "profile": 4}))
    assert result.losses == plain.losses
    events = json.loads((tmp_path / "run" / "profile" / "rank_0.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {name for name in names if str(name).startswith("step ")} == {"step 4", "step 5", "step 6"}
    assert any(str(name).startswith("aten::") for name in names)
    (row,) = [row for row in record.read(result.record) if row.get("event") == "profile"]
    assert (row["step"], row["file"]) == (6, "profile/rank_0.json")
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_disk_that_takes_no_profile_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("a file where the folder would be")
    result, _ = run(toy_config(tmp_path / "run", {"steps": 5, "eval_every": 0, "profile": 2}))
    assert result.step == 5
    assert "profile/rank_0.json could not be written" in capsys.readouterr().err


def test_a_window_that_the_run_cuts_short_is_written(tmp_path: Path) -> None:
    result, _ = run(toy_config(tmp_path / "run", {"steps": 5, "eval_every": 0, "profile": 5}))
    events = json.loads((tmp_path / "run" / "profile" / "rank_0.json").read_text())["traceEvents"]
    assert "step 5" in {event.get("name") for event in events}
    assert result.step == 5


HANGS = """
import sys, time
from pathlib import Path
from bgen.distributed import world
from bgen.train.watch import Watchdog

def never():
    time.sleep(600)

world.start()
watchdog = Watchdog(Path(sys.argv[1]))
watchdog.beat(0.1)
never()
"""


def test_what_hangs_says_so_where_a_person_looks(tmp_path: Path) -> None:
    done = subprocess.run([python(), "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=500)
    stacks = tmp_path / "rank_0.txt"
    assert done.returncode == 1
    assert "in never" in stacks.read_text()
    assert (
        f"error: nothing happened for 0.1 s, so this process ends. The stacks of all its threads are in {stacks}."
        in (done.stderr)
    )
