from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bgen.config.load import validate
from bgen.config.run import Config
from bgen.distributed.world import World
from bgen.track import record, throughput
from bgen.track.devices import peak_flops
from bgen.track.output import RunOutput, run_identifier
from bgen.track.progress import ProgressLine
from bgen.track.throughput import Throughput


def test_rows_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "run" / "record.jsonl"
    writer = record.Record(path)
    writer.append("train", 1, {"loss": 0.1})
    writer.append("valid", 2, {"nll": None})
    writer.sync()
    writer.close()
    first, second = record.read(path)
    assert (first["kind"], first["step"], first["loss"]) == ("train", 1, 0.1)
    assert abs(first["time"] - time.time()) < 60
    assert second["nll"] is None


def test_rows_that_the_disk_does_not_take_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = record.Record(tmp_path / "record.jsonl")
    written, room = os.write, 10

    def write(descriptor: int, text: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        taken = written(descriptor, text[:room])
        room -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        for step in (1, 2, 3):
            writer.append("train", step, {"loss": 0.5})
            assert writer.trouble is not None
    assert writer.kept == 3
    assert (tmp_path / "record.jsonl").stat().st_size == 10
    writer.append("train", 4, {"loss": 0.5})
    assert (writer.trouble, writer.kept) == (None, 0)
    writer.close()
    assert [row["step"] for row in record.read(tmp_path / "record.jsonl")] == [1, 2, 3, 4]


def test_truncation_drops_later_steps_and_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (1, 2, 2, 3)]
    path.write_text("".join(lines) + '{"kind": "train", "st')
    assert [row["step"] for row in record.read(path)] == [1, 2, 2, 3]
    record.truncate(path, 2)
    assert path.read_text() == "".join(lines[:3])
    record.truncate(tmp_path / "missing.jsonl", 2)
    assert list(tmp_path.iterdir()) == [path]


def config(out: Path) -> Any:
    return validate({"stage": "vae", "out": out, "data": {"store": "s"}, "track": {"mlflow": False}}, Config, "test")


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RunOutput(config(tmp_path / "run"), "id", None, World(1, 2, 1, 2, torch.device("cpu")))
    other.row("train", 1, {"loss": 1.0})
    other.say("nothing")
    other.close("FINISHED")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""
    main = RunOutput(config(tmp_path / "run"), "id", None, World(0, 1, 0, 1, torch.device("cpu")))
    main.event("start", 0, {"run": "id"})
    main.row("train", 1, {"loss": math.nan})
    main.row("train", 2, {"loss": 1.0})
    main.close("FINISHED")
    assert [row.get("loss") for row in record.read(tmp_path / "run" / "record.jsonl")] == [None, None, 1.0]
    assert "stage: vae" in (tmp_path / "run" / "config.yaml").read_text()
    assert run_identifier(config(tmp_path / "run")) == "id"
    resumed = RunOutput(config(tmp_path / "run"), "id", 1, World(0, 1, 0, 1, torch.device("cpu")))
    resumed.close("FINISHED")
    assert [row["step"] for row in record.read(tmp_path / "run" / "record.jsonl")] == [0, 1]


def test_progress_without_a_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("vae", 0, 100, shown=True)
    line._began -= 2.0
    for step in range(1, 101):
        line.update(step, f"loss {step}")
    line.close()
    first, last = capsys.readouterr().err.splitlines()
    left = re.fullmatch(r"vae 1/100 \((\d+):(\d\d):(\d\d) left\) loss 1", first)  # 99 steps of 2 s or more
    assert left is not None
    assert sum(int(part) * unit for part, unit in zip(left.groups(), (3600, 60, 1), strict=True)) >= 198
    assert last == "vae 100/100 loss 100"
    silent = ProgressLine("vae", 0, 100, shown=False)
    silent.update(100, "loss")
    silent.say("but [messages] are shown")
    assert capsys.readouterr().err == "but [messages] are shown\n"


def test_progress_on_a_terminal_shows_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    line = ProgressLine("vae", 10, 100, shown=True)
    line.update(50, "loss 0.5 900 cells/s")
    line.update(51)
    line.close()
    said = capsys.readouterr().err
    assert "51/100" in said
    assert "loss 0.5 900 cells/s" in said


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that meters read, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_throughput(clock: list[float]) -> None:
    meter = Throughput()
    clock[0] += 0.3
    meter.add(100, 5000, 0.05)
    meter.pause(0.1)
    figures = meter.report()
    assert figures["cells_per_s"] == pytest.approx(100 / 0.2)
    assert figures["nonzeros_per_s"] == pytest.approx(5000 / 0.2)
    assert figures["data_wait"] == pytest.approx(0.05 / 0.2)
    assert 0.01 < figures["memory_gb"] < 100
    assert meter.report()["cells_per_s"] == 0
    assert not {"tflops_per_s", "mfu"} & set(figures)


@pytest.mark.parametrize("peak", [None, 4e12])
def test_operations_and_their_share_of_the_peak(peak: float | None, clock: list[float]) -> None:
    meter = Throughput(peak)
    clock[0] += 0.5
    meter.add(1, 1, 0.0, flops=1e12)
    figures = meter.report()
    assert figures["tflops_per_s"] == pytest.approx(2.0)
    assert figures.get("mfu") == (None if peak is None else pytest.approx(0.5))


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA GH200 480GB", "pure_bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("cpu", "float32", None),
    ],
)
def test_peaks_by_device(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, precision) == peak
