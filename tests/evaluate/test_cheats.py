"""Cells that are made to deceive are caught by the measure that should; unseen real cells pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from bgen.bench.quality.cheats import AGREEMENT, CHEATS, LABEL, Cheat, Divided, divide, findings, score_cheat
from bgen.evaluate.metrics.registry import METRICS, choose_metrics

CELLS = 250
DOUBTFUL = ("5 % doublets",)
"""Cheats so slight that at this size it is enough if they are not called as good as real cells."""


@pytest.fixture(scope="module")
def divided() -> Divided:
    """Six types, each with two programmes of genes; the rarest is made 2 % of the cells."""
    rng = np.random.default_rng(0)
    types, genes, cells = 6, 150, 1300
    profiles = rng.gamma(0.6, 1.5, size=(types, genes))
    loadings = rng.normal(0, 0.6, size=(types, 2, genes))
    kind = rng.choice(types, cells, p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.1])
    programme = np.einsum("cp,cpg->cg", rng.normal(size=(cells, 2)), loadings[kind])
    rate = profiles[kind] * np.exp(programme - 0.36) * rng.lognormal(0.7, 0.35, size=(cells, 1))
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    return divide(counts, np.array([f"type {k}" for k in kind]), CELLS, rare=0.02)


def caught(divided: Divided, cheat: Cheat) -> None:
    own = choose_metrics(*(key for key in cheat.caught_by if key in METRICS)) or choose_metrics("energy")
    scores = score_cheat(divided, replace(cheat, cells=None), seeds=2, metrics=own)
    found, unsure = findings(scores)
    there = found + unsure if cheat.name in DOUBTFUL else found
    assert set(there) & set(cheat.caught_by), (cheat.name, found, unsure, scores.headline())
    if "labels" in found:
        assert "delivered but for" in scores.headline() or "not delivered" in scores.headline()
    if "memorisation" in found:
        assert "repeat training cells" in scores.headline()


SUBTLE = ("labels shuffled", "5 % doublets", "a type of 1 % made of another", "4.7 % copies")


@pytest.mark.parametrize("cheat", [c for c in CHEATS if c.name in SUBTLE], ids=lambda cheat: cheat.name)
def test_what_deceived_the_first_protocol_is_caught(divided: Divided, cheat: Cheat) -> None:
    caught(divided, cheat)


@pytest.mark.slow
@pytest.mark.parametrize("cheat", [c for c in CHEATS[1:] if c.name not in SUBTLE], ids=lambda cheat: cheat.name)
def test_every_other_cheat_is_caught(divided: Divided, cheat: Cheat) -> None:
    caught(divided, cheat)


def test_unseen_real_cells_pass(divided: Divided) -> None:
    scores = score_cheat(divided, CHEATS[0], seeds=2)
    found, unsure = findings(scores)
    assert found == []
    assert len(unsure) < len(scores.scores) / 2, unsure
    assert scores.headline().startswith(f"Asked for {LABEL}")
    assert scores[AGREEMENT].judgement is not None
    assert np.isfinite([score.model.mean for score in scores.scores]).all()
