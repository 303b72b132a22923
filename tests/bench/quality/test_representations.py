"""``bgen bench representations``: what is compared, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from bgen.bench.quality.representations import (
    VECTOR,
    _chosen,
    bench_representations,
    explained,
    latent_means,
    rows_of,
)
from bgen.config.vae import VAEConfig
from bgen.errors import UserError
from bgen.models.vae.vae import VAE
from data_tools.simulate.simulate import simulate


def test_groups_and_networks_stand_beside_their_shuffled_controls() -> None:
    rows = rows_of(Path("sets.gmt"), Path("edges.csv"))
    for name, key in (("pathways", "groups"), ("regulators", "network")):
        for bias in ("soft", "hard"):
            row, control = rows[f"{name}, {bias}"], rows[f"{name}, shuffled, {bias}"]
            assert row.against == f"{name}, shuffled, {bias}"
            assert control.settings["encoder"][key] == row.settings["encoder"][key] | {"shuffled": True}
    for name, related in (("pathways", "hierarchy"), ("regulators", "relations")):
        chosen = _chosen(rows, [f"{name}, {related}"])
        chain = [f"{name}, {end}" for end in (related, "mixed", "soft", "shuffled, soft")]
        assert [row.against for row in map(chosen.get, chain) if row] == [*chain[1:], VECTOR]
        assert set(chosen) == {VECTOR, *chain}
    assert all(row.against in rows for row in rows.values())
    assert not any(
        "encoder" in row.settings and row.settings["encoder"].get("groups") for row in rows_of(None, None).values()
    )


def test_cells_are_explained_whole_whatever_the_encoder_saw() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent=3, hidden=8, blocks=1), 20, {}).eval()
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (700, 20)).astype(np.float32))
    nothing = sparse.csr_matrix(counts.shape, dtype=np.float32)
    assert explained(vae, counts, counts, 0) == pytest.approx(explained(vae, counts, counts, 0))
    assert explained(vae, nothing, counts, 0) > 20  # of 20 molecules, though none was seen
    assert latent_means(vae, counts).shape == (700, 3)
    assert np.ptp(latent_means(vae, nothing), axis=0).max() == 0


def test_the_command_trains_and_tells(bgen: Any, tmp_path: Path) -> None:
    cells = simulate("demo", cells=300, genes=80)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    given = ["bench", "representations", tmp_path / "cells.h5ad", "--label", "cell_type", "--genes", "60"]
    small = ["--seeds", "1", "--steps", "4", "--few", "0", "--only", "set of molecules", "--out", tmp_path / "out"]
    done = bgen(*given, *small)
    assert done.code == 0, done
    assert "set of molecules: no difference (against state vector)." in done.out  # one seed tells nothing
    told = json.loads((tmp_path / "out" / "representations.json").read_text(encoding="utf-8"))
    assert set(told["runs"]) == {VECTOR, "set of molecules"}
    (figures,) = told["runs"]["set of molecules"]
    assert {"NLL", "accuracy, 20 % genes", "kNN accuracy", "ms"} <= set(figures)
    assert not (tmp_path / "out" / "run").exists()
    # stopped after the first row, it goes on with the second, and changes nothing of the first
    kept = tmp_path / "out" / "rows.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines()
    kept.write_text("\n".join([*lines[:2], lines[2][:20]]), encoding="utf-8")
    again = bgen(*given, *small, "--resume")
    assert again.code == 0, again
    assert f"{VECTOR}, split 0" not in again.err
    after = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    before = [json.loads(line) for line in lines]
    for line in (before[2], after[2]):
        del line["figures"]["ms"]
    assert after == before
    assert bgen(*given, *small).code == 2
    other = bgen(*given, *small, "--resume", "vae.latent=7")
    assert (other.code, "was measured with overrides=[], not ['vae.latent=7']" in other.err) == (2, True)


def test_rows_and_labels_that_are_not_there_are_named(tmp_path: Path) -> None:
    simulate("tiny", cells=200).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(UserError, match="no row 'set of molecule'"):
        bench_representations(
            tmp_path / "cells.h5ad", tmp_path / "out", label="cell_type", only=["set of molecule"], say=print
        )
    with pytest.raises(UserError, match="no obs column 'type'"):
        bench_representations(tmp_path / "cells.h5ad", tmp_path / "out", label="type", say=print)
