"""Real files: good ones pass, and what is wrong with the others is said."""

from __future__ import annotations

import os
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from data_tools.check.check import CheckOptions, check
from data_tools.check.findings import Roles

DATA = Path(os.environ.get("BGEN_REAL_DATA", Path(__file__).parents[3] / "../shared/data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}: set BGEN_REAL_DATA")


def test_pbmc_passes() -> None:
    report = check([DATA / "pbmc_facs_3774x16791.h5ad"])
    assert not report.errors
    assert report.roles.cell_type == "celltype"
    assert "cell_type" in report.roles.detected
    assert report.organism == "Homo sapiens"
    assert len(report.genes) == 16791
    assert report.files[0].keep.all()


def test_worm_genes_have_no_names() -> None:
    path = DATA / "worm_neuron_4186x13488.h5ad"
    report = check([path])
    assert [f.id for f in report.errors] == ["G02"]
    assert "the genes have no names" in report.errors[0].message
    accepted = check([path], CheckOptions(accept_unnamed_genes=True, organism="C. elegans"))
    assert not accepted.errors
    assert accepted.organism == "Caenorhabditis elegans"


def test_log_normalised_pbmc_is_refused_and_says_where_the_counts_are(tmp_path: Path) -> None:
    cells = anndata.read_h5ad(DATA / "pbmc_facs_3774x16791.h5ad")[::5].copy()
    cells.layers["counts"] = cells.X.copy()
    scale = sp.diags(1e4 / np.asarray(cells.X.sum(1)).ravel())
    cells.X = sp.csr_matrix(scale @ cells.X).log1p().astype(np.float32)
    cells.write_h5ad(tmp_path / "log.h5ad")
    report = check([tmp_path / "log.h5ad"])
    assert [f.id for f in report.errors] == ["C01"]
    assert "log1p-normalised" in report.errors[0].message
    assert "Counts found in layers/counts: rerun with --counts layers/counts" in report.errors[0].message
    assert not check([tmp_path / "log.h5ad"], CheckOptions(counts="layers/counts")).errors


def test_time_course_screen_and_doses() -> None:
    worm = check([DATA / "packer_worm_embryo_1805x10000.h5ad"])
    assert (worm.roles.time, worm.roles.time_unit, worm.organism) == (
        "embryo_time",
        "minutes",
        "Caenorhabditis elegans",
    )
    screen = check([DATA / "papalexi_eccite_20729x299.h5ad"])
    assert (screen.roles.perturbation, screen.roles.control) == ("target", "non-targeting")
    assert any("16 of 25 perturbed genes" in f.message for f in screen.findings)
    doses = check([DATA / "a549_dexamethasone_500x198.h5ad"], CheckOptions(roles=Roles(dose="dose", dose_unit="uM")))
    assert (doses.roles.dose, doses.roles.dose_unit) == ("dose", "uM")
    assert any("n_umi_whole_genome" in f.message for f in doses.findings)
    assert not [f for report in (worm, screen, doses) for f in report.errors]
