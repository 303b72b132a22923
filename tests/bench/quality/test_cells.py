"""``bgen bench cells``: the command as its help says, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from bgen.bench.quality import cells
from bgen.bench.quality.cells import CLUSTERS, PEER, POSTERIOR, REAL, TYPES, bench_cells
from bgen.bench.quality.direct import AS_THEY_COME, LATENT_MEANS
from bgen.errors import UserError

TINY = ["vae.train.steps=20", "flow.train.steps=20"]
SMALL = ["vae.train.global_batch=128", "flow.train.global_batch=128", "flow.flow.backbone.width=64"]


@pytest.mark.usefixtures("few_latents")
def test_the_example_of_the_help_runs(bgen: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "TIMED", 1)  # of generation, whose cells do not change
    given = anndata.read_h5ad(demo.cells)[::2].copy()
    given.write_h5ad(tmp_path / "cells.h5ad")
    shown = " ".join(bgen("bench", "cells", "--help").out.replace("│", " ").split())
    example = re.search(r"Example: bgen (bench cells .*?flow\.train\.steps=\d+)", shown)
    done = bgen(*shlex.split(example[1]), *SMALL, "--direct")  # type: ignore[index]
    assert done.code == 0, done
    assert "recall" in done.out
    said = " ".join(done.out.split())
    assert "Generated cells of cells.h5ad (bgen, 50 steps, 100 genes, 2 splits) have a W2 of" in said
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["cells.json"]
    told = json.loads((tmp_path / "bench" / "cells.json").read_text())
    assert (told["train"] + told["test"], told["genes"]) == (given.n_obs, 100)
    flow = ["bgen, 50 steps", "bgen, 4 steps", "bgen, 1 step"]
    direct = [AS_THEY_COME, "direct flow, rounded", "direct flow, Poisson"]
    assert list(told["means"]) == [*flow, f"bgen {POSTERIOR}", TYPES, CLUSTERS, LATENT_MEANS, *direct, REAL]
    assert len(told["seeds"]) == 2
    for row, figures in told["means"].items():
        # Every row has the same genes in the same order: even a hardly trained model knows which are abundant.
        assert figures["mean_spearman"] > (0.5 if row in direct else 0.9), row  # log counts take longer to learn
        assert np.isclose(figures["w2"], np.mean([run[row]["w2"] for run in told["seeds"]]))
    assert told["means"][REAL]["mmd2"] < told["means"]["bgen, 50 steps"]["mmd2"]
    assert all(told["means"][row]["cells_per_s"] > 0 for row in flow)


def test_mistakes_are_told(demo: Any, tmp_path: Path) -> None:
    for arguments, message in (
        ({"file": tmp_path / "no.h5ad"}, "no file"),
        ({"seeds": 1}, "at least 2"),
        ({"steps": [0]}, "at least 1"),
        ({"python": Path(sys.executable)}, "does not have scvi-tools"),
        ({"overrides": ["vea.train.steps=3"]}, r"write vae\.train\.steps"),
    ):
        given: dict[str, Any] = {"file": demo.cells, "genes": 50, "seeds": 2, **arguments}
        with pytest.raises(UserError, match=message):
            bench_cells(given.pop("file"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_scvi_stands_in_the_table(demo: Any, tmp_path: Path) -> None:
    python = os.environ.get("BGEN_SCVI_PYTHON")
    if python is None:
        pytest.skip("set BGEN_SCVI_PYTHON to a Python with scvi-tools")
    found = bench_cells(
        demo.cells, tmp_path / "out", genes=0, seeds=2, steps=[4], python=Path(python), epochs=20, overrides=TINY
    )
    assert found.facts["scvi"]["epochs"] == 20
    for row in PEER.values():
        assert found.estimate(row, "mean_spearman").mean > 0.9
        assert found.estimate(row, "cells_per_s").mean > 0
