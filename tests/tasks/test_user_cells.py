"""One reader for every verb: whatever the file looks like, the same cells give the same latent states."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

import bgen
from bgen.errors import UserError
from bgen.hub.directory import save_model
from bgen.tasks.cells import annotate
from bgen.tasks.load import Model
from bgen.tasks.user_cells import read_user_data


@pytest.fixture(scope="module")
def model(demo: Any) -> Model:
    return bgen.load(demo.model)


@pytest.fixture(scope="module")
def cells(demo: Any, model: Model) -> anndata.AnnData:
    """Sixty of the demo's cells, in the model's order of genes, with nothing in obs."""
    adata = anndata.read_h5ad(demo.cells)[:60, model.genes].copy()
    return anndata.AnnData(adata.X, obs=pd.DataFrame(index=adata.obs_names), var=adata.var[[]])


@pytest.fixture(scope="module")
def latents(model: Model, cells: anndata.AnnData) -> np.ndarray:
    return model.encode(cells)[0]


@pytest.fixture(scope="module")
def human_model(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with Ensembl ids, and its own ids as symbols."""
    genes = model.saved.genes.assign(symbol=model.genes, id=[f"ENSG{i:011d}" for i in range(len(model.genes))])
    folder = tmp_path_factory.mktemp("human") / "model"
    save_model(replace(model.saved, genes=genes), folder)
    return folder


def ensembl(cells: anndata.AnnData) -> anndata.AnnData:
    renamed = cells.copy()
    renamed.var_names = [f"ENSG{i:011d}.{i % 7}" for i in range(cells.n_vars)]
    return renamed


def in_raw(cells: anndata.AnnData) -> anndata.AnnData:
    more = cells.copy()
    more.raw = cells
    more.X = cells.X.log1p()
    return more[:, :30].copy()


def in_a_layer(cells: anndata.AnnData) -> anndata.AnnData:
    more = cells.copy()
    more.layers["umis"] = cells.X
    more.X = cells.X.log1p()
    return more


def in_a_column(cells: anndata.AnnData) -> anndata.AnnData:
    numbered = cells.copy()
    numbered.var["gene_ids"] = cells.var_names
    numbered.var_names = [str(i) for i in range(cells.n_vars)]
    return numbered


def twice(cells: anndata.AnnData) -> anndata.AnnData:
    """Every gene in two columns of the same name, its molecules divided among them."""
    first = cells.X.copy()
    first.data = np.floor(first.data / 2)
    first.eliminate_zeros()
    both = anndata.AnnData(sp.hstack([first, cells.X - first]).tocsr(), obs=cells.obs)
    both.var_names = [*cells.var_names, *cells.var_names]
    return both


def noisy(cells: anndata.AnnData) -> anndata.AnnData:
    near = cells.copy()
    near.X.data = near.X.data + 1e-5
    return near


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize(
    ("change", "options"),
    [
        (in_raw, ["--counts", "raw/X"]),
        (in_raw, ["--counts", "auto"]),
        (in_a_layer, ["--counts", "auto"]),
        (in_a_layer, ["--counts", "layers/umis"]),
        (in_a_layer, ["--layer", "umis"]),
        (in_a_column, ["--gene-column", "gene_ids"]),
        (twice, []),
        (noisy, []),
    ],
)
def test_the_same_cells_have_the_same_latents(
    bgen: Any,
    demo: Any,
    cells: anndata.AnnData,
    latents: np.ndarray,
    tmp_path: Path,
    change: Callable[[anndata.AnnData], anndata.AnnData],
    options: list[str],
) -> None:
    changed = change(cells)
    changed.write_h5ad(tmp_path / "my.h5ad")
    done = bgen("embed", demo.model, tmp_path / "my.h5ad", "--out", tmp_path / "out.h5ad", *options)
    assert done.code == 0, done
    assert "120 of the model's 120 genes are in the data (100%)." in done.err
    made = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert np.array_equal(made.obsm["X_bgen"], latents)
    assert made.var_names.equals(changed.var_names)  # all that the user had is there
    named = [[name for name in kept.layers if name is not None] for kept in (made, changed)]  # None: X, from 0.13 on
    assert named[0] == named[1]
    assert (made.raw is None) == (changed.raw is None)


def write_10x_h5(path: Path, cells: anndata.AnnData) -> None:
    counts = sp.csr_matrix(cells.X).astype(np.int32)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
        group["shape"] = np.array(counts.shape[::-1])
        group["barcodes"] = cells.obs_names.to_numpy().astype("S")
        group["features/id"] = cells.var_names.to_numpy().astype("S")
        group["features/name"] = cells.var_names.to_numpy().astype("S")
        group["features/genome"] = np.bytes_("none")


def write_mtx(path: Path, cells: anndata.AnnData) -> None:
    path.mkdir()
    scipy.io.mmwrite(path / "GSM1_matrix.mtx", sp.coo_matrix(cells.X.T).astype(np.int64))
    texts = {
        "features.tsv": ["gene_id\tgene_name", *(f"{name}\t{name}" for name in cells.var_names)],
        "barcodes.tsv": ["barcode", *cells.obs_names],
    }
    for name, lines in texts.items():
        (path / f"GSM1_{name}.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cells.zarr", lambda path, cells: cells.write_zarr(path)),
        ("cells.h5", write_10x_h5),
        ("folder", write_mtx),
    ],
)
def test_every_format_is_read(
    bgen: Any, demo: Any, cells: anndata.AnnData, latents: np.ndarray, tmp_path: Path, name: str, write: Any
) -> None:
    write(tmp_path / name, cells)
    done = bgen("embed", demo.model, tmp_path / name, "--out", tmp_path / "out.h5ad")
    assert done.code == 0, done
    made = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert np.array_equal(made.obsm["X_bgen"], latents)
    assert made.obs_names.equals(cells.obs_names)


@pytest.mark.parametrize("names", ["symbols", "versions", "a column of symbols"])
def test_symbols_and_ensembl_ids_meet_in_the_models_table(
    human_model: Path, cells: anndata.AnnData, latents: np.ndarray, names: str
) -> None:
    data = ensembl(cells) if names == "versions" else cells.copy()
    if names == "a column of symbols":
        data.var["symbol"] = cells.var_names
        data.var_names = [f"my{i}A" for i in range(cells.n_vars)]
    read = bgen.load(human_model).read(data)
    assert read.matched.way == {"symbols": "id as the model's symbol", "versions": "id"}.get(names, "symbol")
    assert (read.counts != cells.X).nnz == 0
    assert np.array_equal(bgen.load(human_model).encode(read)[0], latents)


def test_every_verb_reads_alike(
    bgen: Any, demo: Any, course: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts in raw/X and gene ids in a column of var, for verbs that take more than counts."""
    monkeypatch.setattr(annotate, "STRENGTHS", annotate.STRENGTHS[3:4])  # each costs its fits
    plain = anndata.read_h5ad(demo.cells)[::3].copy()
    strange = in_raw(in_a_column(plain))
    strange.write_h5ad(tmp_path / "strange.h5ad")
    plain.write_h5ad(tmp_path / "plain.h5ad")
    reading = ["--counts", "raw/X", "--gene-column", "gene_ids"]
    train = ["train.steps=2", "train.global_batch=32", "track.progress=false", "track.mlflow=false"]
    made: dict[str, dict[str, Any]] = {}
    for name, options in (("plain", []), ("strange", reading)):
        found = made[name] = {}
        for verb, folder, more in (
            ("annotate", demo.model, ["--label", "cell_type"]),
            ("denoise", demo.model, []),
            ("integrate", demo.model, []),
            ("interpolate", course, ["--time", 30, "--n", 20]),  # when there are no cells to score by
            ("forecast", course, ["--time", 36, "--n", 20]),
        ):
            out = tmp_path / f"{name}_{verb}.h5ad"
            done = bgen(verb, folder, tmp_path / f"{name}.h5ad", *more, *options, "--out", out)
            assert done.code == 0, done
            found[verb] = anndata.read_h5ad(out)
        tuned = tmp_path / f"{name}_tuned"
        asked = ["--task", "generate", "--out", tuned, *options, *train]
        done = bgen("finetune", demo.model, tmp_path / f"{name}.h5ad", *asked)
        assert done.code == 0, done
        found["finetune"] = (tuned / "model" / "model.safetensors").read_bytes()
    first, second = made["plain"], made["strange"]
    labels = [one["annotate"].obs["cell_type_bgen"].astype(str).tolist() for one in (first, second)]
    assert labels[0] == labels[1]
    for verb, layer in (("denoise", "denoised"), ("integrate", "integrated")):
        assert np.array_equal(first[verb].layers[layer][:, :30], second[verb].layers[layer])
    for verb in ("interpolate", "forecast"):
        assert (first[verb].X != second[verb].X).nnz == 0
    assert first["finetune"] == second["finetune"]


def test_what_was_matched_is_told(bgen: Any, demo: Any, model: Model, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(demo.cells)[:60]
    order = np.argsort(-np.asarray(cells.X.sum(0)).ravel(), kind="stable")
    few = cells[:, np.sort(order[5:])].copy()  # the genes with most molecules are missing
    few.var_names = ["other" if i == 0 else name for i, name in enumerate(few.var_names)]
    few.obs["batch"] = ["batch_new"] * 10 + few.obs["batch"].astype(str).tolist()[10:]
    matched = model.read(few, floor=0.5).matched
    assert (matched.genes, len(matched.missing), matched.unknown) == (114, 6, ["other"])
    assert matched.values == {"batch": {"batch_new": 10}}
    assert matched.molecules == pytest.approx(1 - few.X[:, 0].sum() / few.X.sum())
    share = np.asarray(cells.X.sum(0)).ravel()[order[:5]].sum() / cells.X.sum()
    assert matched.missing_molecules == pytest.approx(share, abs=0.1)
    few.write_h5ad(tmp_path / "few.h5ad")
    done = bgen("embed", demo.model, tmp_path / "few.h5ad", "--out", tmp_path / "a.h5ad", "--floor", 0.5)
    assert "114 of the model's 120 genes" in done.err
    assert "The genes that the data lacks hold about" in done.err
    assert "batch_new (10) cells" in done.err
    told = json.loads(
        bgen("embed", demo.model, tmp_path / "few.h5ad", "--out", tmp_path / "b.h5ad", "--floor", 0.5, "--json").out
    )
    assert told["matched"]["genes_missing"] == 6
    assert told["matched"]["unknown_values"] == {"batch": {"batch_new": 10}}
    half = few[:, :60].copy()
    del half.var["symbol"]  # by which the other gene would be found
    with pytest.raises(UserError, match=r"59 of the 120 genes.*--floor.*hold 9\d% of the data's"):
        model.read(half)
    assert model.read(half, floor=0.2).matched.genes == 59


def test_the_gate_counts_molecules_and_not_genes(model: Model, cells: anndata.AnnData) -> None:
    """A few genes hold most molecules, so a share of the genes says little about what is there."""
    order = np.argsort(-model.expected_shares(), kind="stable")
    with pytest.raises(UserError, match=r"115 of the 120 genes of the model \(96%\), which hold [4-7]\d% of the mol"):
        model.read(cells[:, np.sort(order[5:])].copy())
    most = model.read(cells[:, np.sort(order[:72])].copy()).matched  # 60 % of the genes
    assert most.genes == 72
    assert most.missing_molecules < 0.2


def test_cells_without_any_count_are_refused(model: Model, cells: anndata.AnnData) -> None:
    empty = cells.copy()
    empty.X = empty.X * 0
    for verb in (model.embed, model.denoise):
        with pytest.raises(UserError, match="No cell has a count of a gene that the model knows"):
            verb(empty)


def test_what_is_not_counts_is_told_with_where_counts_are(model: Model, cells: anndata.AnnData) -> None:
    def said(adata: anndata.AnnData, **reading: Any) -> str:
        with pytest.raises(UserError) as raised:
            model.read(adata, **reading)
        return str(raised.value)

    assert "X is not counts" in said(in_raw(cells))
    assert "--counts raw/X" in said(in_raw(cells))
    infinite = cells.copy()
    infinite.X.data[3] = np.inf
    assert "X is not counts: it holds NaN or infinite values" in said(infinite)
    assert "var['gene_ids'] has enough of them: --gene-column gene_ids" in said(in_a_column(cells))
    assert "no column 'gene_id'. Did you mean 'gene_ids'" in said(in_a_column(cells), gene_column="gene_id")
    assert "no matrix 'layers/umi'. Did you mean 'layers/umis'" in said(in_a_layer(cells), counts="layers/umi")
    assert "give one of them" in said(in_a_layer(cells), counts="layers/umis", layer="umis")
    bare = in_a_layer(cells)
    bare.X = None
    assert "the data has no X. Counts found in layers/umis: rerun with --counts layers/umis" in said(bare)
    parts = cells.copy()
    for name in ("ambiguous", "spliced", "unspliced"):
        parts.layers[name] = cells.X
    parts.X = cells.X.log1p()
    for counts in (None, "auto"):
        assert "Add the parts up" in said(parts, counts=counts)
    assert model.read(parts, counts="layers/spliced").matched.matrix == "layers/spliced"


def test_cells_are_read_once_for_many_verbs(model: Model, human_model: Path, demo: Any) -> None:
    adata = anndata.read_h5ad(demo.cells)[:80].copy()
    read = model.read(demo.cells)
    assert len(read) == 600
    some = read[np.arange(80)]
    assert np.array_equal(model.embed(some).obsm["X_bgen"], model.embed(adata).obsm["X_bgen"])
    assert np.array_equal(model.denoise(some).layers["denoised"], model.denoise(adata).layers["denoised"])
    assert model.embed(some).obs.equals(adata.obs)
    with pytest.raises(UserError, match="read already: floor has to be given"):
        model.embed(read, floor=0.5)
    with pytest.raises(UserError, match="other genes"):
        bgen.load(human_model).embed(read)


def test_a_model_reads_what_was_already_opened(model: Model, cells: anndata.AnnData, latents: np.ndarray) -> None:
    opened = read_user_data(in_raw(cells), counts="raw/X")
    assert np.array_equal(model.encode(model.read(opened))[0], latents)
    assert np.array_equal(opened.totals(), np.asarray(cells.X.sum(0)).ravel())


def test_a_file_that_memory_cannot_hold_is_refused_at_once(bgen: Any, demo: Any, tmp_path: Path) -> None:
    """720 GB of zeros that take no room on the disk."""
    n = 300_000
    names = pd.Index([str(i) for i in range(n)])
    anndata.AnnData(obs=pd.DataFrame(index=names), var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "huge.h5ad")
    with h5py.File(tmp_path / "huge.h5ad", "a") as file:
        matrix = file.create_dataset("X", shape=(n, n), dtype="f8", chunks=(1000, 1000))
        matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    done = bgen("embed", demo.model, tmp_path / "huge.h5ad", "--out", tmp_path / "out.h5ad")
    assert done.code == 2
    assert "huge.h5ad takes 720.0 GB in memory" in " ".join(done.err.split())
    assert "with --out NAME.zarr" in " ".join(done.err.split())
