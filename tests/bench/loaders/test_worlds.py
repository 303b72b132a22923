"""Ranks of large worlds, on the chunks of a small store: what they decode, hold and write down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bgen.bench.loaders.worlds import simulate, table, walk


@pytest.mark.parametrize(
    ("world", "lanes", "least", "most"), [(8, 32, 1, 1.02), (32, 32, 1, 1.02), (24, 32, 1.45, 1.55)]
)
def test_a_rank_decodes_its_share(world: int, lanes: int, least: float, most: float) -> None:
    ranks = {0, world // 2, world - 1}
    found = [walk(40_000_000, world, rank, lanes, share=512, steps=150)["decoded"] for rank in ranks]
    assert all(least <= one <= most for one in found)


def test_more_ranks_than_lanes_decode_more() -> None:
    assert 3.5 < walk(40_000_000, 32, 9, 8, share=512, steps=150)["decoded"] < 4.5


def test_steps_of_less_than_a_window_say_nothing_of_what_is_decoded() -> None:
    found = walk(1_000_000, 1, 0, 64, share=64, steps=3)
    assert found["decoded"] != found["decoded"]
    assert found["first"] > 0 < found["step"]


def test_a_world_is_simulated_and_written_down(tmp_path: Path) -> None:
    said: list[str] = []
    (row,) = simulate(tmp_path / "out", [2], cells=2_000_000, lanes=4, steps=40, say=said.append)
    assert json.loads((tmp_path / "out" / "worlds.json").read_text()) == [row]
    assert (row["world"], row["lanes"], row["ranks"]) == (2, 4, [0, 1])
    assert row["own"] < 200e6
    assert 1 <= row["decoded"] < 1.1
    assert table([row]) in said
