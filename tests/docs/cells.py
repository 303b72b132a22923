"""Write the cells that the pages' command blocks speak of: ``python tests/docs/cells.py my.h5ad screen.h5ad``.

Real counts from the folder ``BGEN_REAL_DATA`` (else ``../shared/data``, seen from the repository) where they are, else
simulated ones with the same columns and names:

- ``my.h5ad``: blood cells of two donors with and without interferon beta (Kang et al. 2018), every other cell, the
  :data:`GENES` genes with most counts; obs ``cell_type`` ("B cells", ...), ``batch`` ("d101", "d107") and ``stim``
  ("ctrl", "stim");
- ``screen.h5ad``: a CRISPR screen (Papalexi et al. 2021), every eighth cell, 299 genes; obs ``target``
  ("non-targeting", "STAT1", "IRF1", ...) and ``batch`` (three replicates);
- ``course.h5ad``: neurons of C. elegans embryos (Packer et al. 2019), 1,805 cells, as many genes; obs ``time``
  (minutes: 240, 300, 360, 420, 480, 540, 615, 720), ``cell_type``, ``batch`` and ``donor`` ("embryos").
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np

from data_tools.simulate.simulate import simulate

REAL = Path(os.environ.get("BGEN_REAL_DATA", Path(__file__).resolve().parents[3] / "shared/data"))

GENES = 500
"""So few that shipped configurations are trained in minutes."""

TYPES = ("B cells", "CD14+ Monocytes", "CD4 T cells", "CD8 T cells", "FCGR3A+ Monocytes")
TARGETS = ("STAT1", "IRF1", "STAT2", "JAK2", "STAT3", "NFKBIA", "CMTM6", "IFNGR2")
TIMES = {
    "210-270": 240.0,
    "270-330": 300.0,
    "330-390": 360.0,
    "390-450": 420.0,
    "450-510": 480.0,
    "510-580": 540.0,
    "580-650": 615.0,
    "> 650": 720.0,
}


def my_cells() -> anndata.AnnData:
    """Cells of several types, in two batches, some of them under a stimulus."""
    if (file := REAL / "kang_ifnb_1556x1267.h5ad").is_file():
        cells = most_counted(anndata.read_h5ad(file)[::2])
        cells.obs["batch"] = cells.obs["donor"]
    else:
        cells = simulate("demo", cells=1500)
        cells.obs["cell_type"] = renamed(cells.obs["cell_type"], TYPES)
        cells.obs["batch"] = np.where(cells.obs["batch"] == "batch_1", "d101", "d107")
        cells.obs["stim"] = np.where(cells.obs["drug"] == "vehicle", "ctrl", "stim")
    cells.obs = cells.obs[["cell_type", "batch", "stim"]].copy()
    return cells


def screen_cells() -> anndata.AnnData:
    """Cells of a screen of knock-outs, in replicates."""
    if (file := REAL / "papalexi_eccite_20729x299.h5ad").is_file():
        cells = anndata.read_h5ad(file)[::8].copy()
        cells.obs["batch"] = cells.obs["bio_rep"]
    else:
        cells = simulate("demo", cells=4000)
        cells = cells[cells.obs["drug"] == "vehicle"].copy()
        targets = sorted({gene for label in cells.obs["perturbation"] for gene in label.split("+")} - {"control"})
        names = dict(zip(targets, TARGETS, strict=True)) | {"control": "non-targeting"}
        cells.obs["target"] = [
            "+".join(names[part] for part in label.split("+")) for label in cells.obs["perturbation"]
        ]
        cells.var_names = [names.get(gene, gene) for gene in cells.var_names]
    cells.obs = cells.obs[["target", "batch"]].copy()
    return cells


def course_cells() -> anndata.AnnData:
    """Cells at several times."""
    if (file := REAL / "packer_worm_embryo_1805x10000.h5ad").is_file():
        cells = anndata.read_h5ad(file)
        cells.obs["time"] = cells.obs["embryo_time_bin"].astype(str).map(TIMES)
        cells = most_counted(cells)
    else:
        cells = simulate("demo", cells=1800)
        cells.obs["time"] = 240.0 + 60.0 * (cells.obs["time"] / 24.0)
    cells.obs["donor"] = "embryos"
    cells.obs = cells.obs[["time", "cell_type", "batch", "donor"]].copy()
    return cells


def most_counted(cells: anndata.AnnData) -> anndata.AnnData:
    """Return the cells with only the genes that have most counts."""
    most = np.argsort(-np.asarray(cells.X.sum(0)).ravel(), kind="stable")[:GENES]
    return cells[:, np.sort(most)].copy()


def renamed(values: object, names: tuple[str, ...]) -> list[str]:
    """Return the values with their sorted distinct ones replaced by names; those left over take the last name."""
    texts = [str(value) for value in values]  # type: ignore[attr-defined]
    number = {text: min(place, len(names) - 1) for place, text in enumerate(sorted(set(texts)))}
    return [names[number[text]] for text in texts]


FILES: dict[str, Callable[[], anndata.AnnData]] = {
    "my.h5ad": my_cells,
    "screen.h5ad": screen_cells,
    "course.h5ad": course_cells,
}


def main(paths: list[str]) -> None:
    """Write each of the files; which cells it holds follows from its name."""
    for path in map(Path, paths):
        cells = FILES[path.name]()
        cells.uns = {key: value for key, value in cells.uns.items() if key == "organism"}  # "synthetic" has few genes
        cells.obsm.clear()
        cells.write_h5ad(path)
        print(f"{path}: {cells.n_obs:,} cells x {cells.n_vars:,} genes")


if __name__ == "__main__":
    main(sys.argv[1:])
