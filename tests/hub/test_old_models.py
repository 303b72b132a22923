"""Model directories of 0.1.0's first code load and give what they gave then. Its perturbation models are refused.

``fixtures_0_1_0/README.md`` says how they were made. ``python tests/hub/test_old_models.py``, with that code on the
path, writes what they gave into ``expected.json`` beside each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import bgen
from bgen.errors import UserError

FIXTURES = Path(__file__).with_name("fixtures_0_1_0")
MODELS = ("vae", "vae_nb", "flow", "lora", "course", "time", "annotator")

SAME_COUNTS = 0.99
"""Share of drawn counts that are the same on another CPU: a last bit moves one that lies on an edge."""


def read_cells() -> anndata.AnnData:
    """The first 60 of the cells that the models were trained on."""
    table = pd.read_csv(FIXTURES / "cells.csv", index_col=0)
    genes = [name for name in table.columns if name.startswith("G")]
    obs = table.drop(columns=genes)
    counts = sp.csr_matrix(table[genes].to_numpy(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def outputs(name: str) -> dict[str, Any]:
    """What a model gives: floats as floats, counts as integers, names as text."""
    model, cells = bgen.load(str(FIXTURES / name)), read_cells()
    found: dict[str, Any] = {"genes": model.genes, "conditions": model.conditions}
    found["embedding"] = model.embed(cells).obsm["X_bgen"][:20]
    found["denoised"] = model.denoise(cells[:20]).layers["denoised"][:5]
    made: dict[str, anndata.AnnData] = {}
    if name in ("flow", "lora"):
        made["asked"] = model.generate(12, where={"cell_type": "B", "time": 36.0}, seed=1)
        made["any"] = model.generate(12, seed=2, steps=2)
    elif name in ("course", "time"):
        if name == "course":  # the other was trained to fill in and to forecast only
            made["all times"] = model.generate(6, times="all", seed=1)
        made["interpolated"] = model.interpolate(cells, 24.0, n=8, seed=1)
        made["forecast"] = model.forecast(cells, 48.0, n=8, seed=1)
    elif name == "annotator":
        unlabelled = cells[:20].copy()
        del unlabelled.obs["cell_type"]
        labelled = model.annotate(unlabelled).obs
        found |= {column: labelled[column].to_numpy() for column in labelled if column not in cells.obs}
    for what, drawn in made.items():
        found[f"{what}: counts"] = drawn.X.toarray().astype(int)
        for column in drawn.obs:
            found[f"{what}: {column}"] = drawn.obs[column].to_numpy()
    return {what: _plain(value) for what, value in found.items()}


def _plain(value: Any) -> Any:
    """As JSON holds it: floats with 8 digits."""
    if isinstance(value, dict):
        return value
    values = np.asarray(value)
    if values.dtype.kind == "f":
        return np.vectorize(lambda x: float(f"{x:.8g}"), otypes=[float])(values).tolist()
    return values.tolist() if values.dtype.kind in "iub" else values.astype(str).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_an_old_model_gives_what_it_gave(name: str) -> None:
    expected = json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
    found = outputs(name)
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        if what.endswith(": counts"):
            assert np.shape(found[what]) == np.shape(value), what
            assert np.mean(np.equal(found[what], value)) >= SAME_COUNTS, what
        elif isinstance(value, list) and value and isinstance(np.ravel(value)[0], float):
            np.testing.assert_allclose(found[what], value, rtol=1e-4, atol=1e-5, err_msg=what)
        else:
            assert found[what] == value, what


@pytest.mark.parametrize("name", ["perturbation", "network"])
def test_an_old_perturbation_model_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"early bgen, which this one .* does not read: train it again") as told:
        bgen.load(str(FIXTURES / name))
    assert str(told.value).count(". ") == 0


if __name__ == "__main__":
    for model_name in MODELS:
        text = json.dumps(outputs(model_name), indent=None, separators=(",", ":"))
        (FIXTURES / model_name / "expected.json").write_text(text + "\n", encoding="utf-8")
