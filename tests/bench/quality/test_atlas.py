"""``bgen bench atlas``: contexts are left out whole, the command scores them and what a few of their cells add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bgen.bench.quality.atlas import Size, bench_atlas
from bgen.errors import UserError


@pytest.mark.parametrize("contexts", [[], [13], [0]])
def test_there_are_as_many_contexts_as_are_simulated(contexts: list[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 to 12 of the 16 simulated contexts can be trained on"):
        bench_atlas(tmp_path / "out", contexts, Size(), seeds=1, say=print)
    with pytest.raises(UserError, match=r"no screens 'line'\. Did you mean 'lines'"):
        bench_atlas(tmp_path / "out", [3], Size("line"), seeds=1, say=print)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_unseen_contexts_and_a_few_of_their_cells_are_scored(bgen: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--cells", "24000", "--genes", "60", "--vae-steps", "60", "--flow-steps", "20"]
    small = "flow.backbone={name: mlp, width: 16, layers: 1}"
    done = bgen("bench", "atlas", "--contexts", "3", "--seeds", "1", *sizes, "--out", out, small)
    assert done.code == 0, done
    told = json.loads((out / "atlas.json").read_text(encoding="utf-8"))
    assert {"3 contexts"} < set(told["trained on"])
    assert any("fine-tuned" in key for key in told["trained on"])
    assert (told["cells"], told["genes"], told["overrides"]) == (24000, 60, [small])
    for key in ("3 contexts", "similar contexts", "latent shift"):
        assert key in done.out, done.out
    assert not (out / "run").exists()
