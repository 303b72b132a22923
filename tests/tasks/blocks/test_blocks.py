"""A block at a time: the same as in memory, from any kind of input, killed or not, with nothing overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import prefork
import pytest
import torch
import zarr
from servers import serve

import bgen
from bgen.errors import UserError
from bgen.hub.about import Annotation
from bgen.hub.directory import save_model
from bgen.models.annotator import Annotator
from bgen.store.format.columns import ROWS_CHUNK
from bgen.store.open import open_store
from bgen.tasks.blocks import cells as block_cells
from bgen.tasks.blocks import reference
from bgen.tasks.blocks.folder import Writer
from bgen.tasks.blocks.opened import Opened
from bgen.tasks.blocks.run import rows_of_block
from bgen.tasks.cells import annotate
from bgen.tasks.load import Model
from data_tools.export.to_webdataset import to_webdataset
from data_tools.inputs import h5ad, source
from data_tools.inputs.source import Source


@pytest.fixture(scope="module")
def model(demo: Any) -> Model:
    return bgen.load(demo.model)


@pytest.fixture(scope="module")
def embedded(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole of the demo's store, embedded."""
    out = tmp_path_factory.mktemp("embedded") / "store.zarr"
    done = bgen("embed", demo.model, demo.store, "--out", out, "--variance")
    assert done.code == 0, done
    assert "600 cells" in done.out
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let classifiers choose among one strength: each costs five fits."""
    monkeypatch.setattr(annotate, "STRENGTHS", annotate.STRENGTHS[3:4])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_in_blocks_is_what_it_is_in_memory(demo: Any, model: Model, embedded: Path) -> None:
    made, whole = anndata.read_zarr(embedded), model.embed(str(demo.store), variance=True)
    assert rows_of_block(made.n_obs) == 256  # three blocks, the last of them short
    for name in ("X_bgen", "X_bgen_variance"):
        np.testing.assert_allclose(made.obsm[name], whole.obsm[name], rtol=1e-4, atol=1e-5)
    assert made.obs_names.equals(whole.obs_names)
    for column in whole.obs:
        pd.testing.assert_series_equal(made.obs[column], whole.obs[column], check_categorical=False, check_dtype=False)
    splits = open_store(demo.store).manifest.splits
    assert made.obs["split"].value_counts().to_dict() == splits
    lazily = anndata.experimental.read_elem_lazy(zarr.open_group(embedded, mode="r")["obsm/X_bgen"])
    assert lazily.chunksize[0] == 256  # dask's
    assert np.array_equal(lazily[300:310].compute(), made.obsm["X_bgen"][300:310])


def test_every_form_of_a_store_gives_the_same_bytes(bgen: Any, demo: Any, embedded: Path, tmp_path: Path) -> None:
    from bgen.store.store import Store

    to_webdataset(Store(demo.store), tmp_path / "tar")
    with serve(demo.store) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for name, where in (("tar", tmp_path / "tar"), ("http", server.url)):
            done = bgen("embed", demo.model, where, "--out", tmp_path / f"{name}.zarr", "--variance")
            assert done.code == 0, done
            assert files(tmp_path / f"{name}.zarr") == files(embedded)


def test_a_killed_run_goes_on(bgen: Any, demo: Any, embedded: Path, tmp_path: Path) -> None:
    """Killed when the second block is written and not yet told; the first block is not made again."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from bgen.cli.main import main\n"
        "from bgen.tasks.blocks import run\n"
        "commit = run.commit\n"
        "def kill(path, data):\n"
        "    if path.name == '1.json': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    commit(path, data)\n"
        "run.commit = kill\n"
        "main()\n"
    )
    out, partial = tmp_path / "out.zarr", tmp_path / ".out.zarr.partial"
    asked = ["embed", demo.model, demo.store, "--out", out, "--variance"]
    done = subprocess.run(
        [prefork.python(), script, *map(str, asked)], check=False, capture_output=True, timeout=600, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert [path.name for path in (partial / "build/done").iterdir()] == ["0.json"]
    first = (partial / "obsm/X_bgen/0.0").stat().st_ino
    other = bgen(*asked[:-1])  # without --variance: another result
    assert other.code == 2
    assert "A run of" in other.err
    assert "differs from it in: --variance" in " ".join(other.err.split())
    assert bgen(*asked).code == 0
    assert files(out) == files(embedded)
    assert (out / "obsm/X_bgen/0.0").stat().st_ino == first
    assert not partial.exists()


def test_restart_throws_away_what_another_run_left(bgen: Any, demo: Any, embedded: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.zarr.partial"
    (partial / "build").mkdir(parents=True)
    (partial / "build/plan.json").write_text(json.dumps({"the model": "another"}))
    (partial / "obsm").write_text("left over")
    asked = ["embed", demo.model, demo.store, "--out", tmp_path / "out.zarr", "--variance"]
    assert bgen(*asked).code == 2
    assert (partial / "obsm").read_text() == "left over"
    assert bgen(*asked, "--restart").code == 0
    assert files(tmp_path / "out.zarr") == files(embedded)


def test_what_is_there_is_refused_and_stays(bgen: Any, demo: Any, embedded: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.zarr"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    for out in (theirs, embedded):
        before = files(out)
        done = bgen("embed", demo.model, demo.store, "--out", out)
        assert done.code == 2
        assert "is there already and not empty" in " ".join(done.err.split())
        assert files(out) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "cells.h5ad", "--restart"], "--restart is for --out NAME.zarr"),
        (["--out", "s3://bucket/out.zarr"], "is an address"),
        (
            ["--out", "out.zarr", "--counts", "raw/X"],
            "is a store, which knows its counts and genes: leave out --counts",
        ),
        (["--out", "out.zarr", "--floor", "2"], "floor"),
    ],
)
def test_a_mistake_is_one_sentence(
    bgen: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = bgen("embed", demo.model, demo.store, *more)
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_damage_ends_the_run_and_keeps_what_is_done(bgen: Any, demo: Any, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    for name, data in files(demo.store).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    shard = copy / "counts/c/0/0"
    good = shard.read_bytes()
    last = len(good) // 2
    shard.write_bytes(good[:last] + bytes([good[last] ^ 255]) + good[last + 1 :])
    asked = ["embed", demo.model, copy, "--out", tmp_path / "out.zarr"]
    done = bgen(*asked)
    assert done.code == 2
    assert "What is done so far is kept in" in " ".join(done.err.split())
    assert (tmp_path / ".out.zarr.partial/build/done").is_dir()
    shard.write_bytes(good)
    assert bgen(*asked).code == 0


@pytest.mark.usefixtures("quick")
def test_a_file_is_read_in_blocks_and_never_whole(
    bgen: Any, demo: Any, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read at once is bounded, whatever the file holds."""
    cells = anndata.read_h5ad(demo.cells)
    whole = {"embed": model.embed(cells), "denoise": model.denoise(cells), "annotate": model.annotate(cells, "donor")}
    read: list[int] = []
    rows = h5ad.H5adSource._rows

    def counted(self: Any, *arguments: Any) -> Any:
        for first, block in rows(self, *arguments):
            read.append(block.shape[0])
            yield first, block

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("all of the file is read")

    monkeypatch.setattr(source, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(h5ad.H5adSource, "_rows", counted)
    monkeypatch.setattr(Source, "read", never)
    monkeypatch.setattr(anndata, "read_h5ad", never)
    for verb, more in (("embed", []), ("denoise", []), ("annotate", ["--label", "donor"])):
        out = tmp_path / f"{verb}.zarr"
        done = bgen(verb, demo.model, demo.cells, *more, "--out", out)
        assert done.code == 0, done
        assert max(read) < 60
        assert sum(read) >= 2 * cells.n_obs  # once to see that they are counts, and once to do it
        read.clear()
        made = anndata.read_zarr(out)
        assert made.obs_names.equals(cells.obs_names)
        if verb == "embed":
            np.testing.assert_allclose(made.obsm["X_bgen"], whole[verb].obsm["X_bgen"], rtol=1e-4, atol=1e-5)
        elif verb == "denoise":
            found = whole[verb][:, made.var_names].layers["denoised"]
            np.testing.assert_allclose(made.layers["denoised"], found, rtol=1e-3, atol=1e-5)
            assert "Poisson deviance on molecules held out" in done.out
        else:
            assert made.obs["donor_bgen"].astype(str).equals(whole[verb].obs["donor_bgen"].astype(str))


@pytest.mark.usefixtures("quick")
def test_labels_of_a_store_are_those_in_memory(bgen: Any, demo: Any, model: Model, tmp_path: Path) -> None:
    done = bgen("annotate", demo.model, demo.store, "--label", "cell_type", "--out", tmp_path / "out.zarr", "--json")
    assert done.code == 0, done
    made, whole = anndata.read_zarr(tmp_path / "out.zarr"), model.annotate(str(demo.store), "cell_type")
    told, expected = json.loads(done.out), whole.uns["bgen_annotate"]
    for name in ("query_cells", "abstained", "reference_cells", "seen", "macro_f1"):
        assert told[name] == expected[name]
    assert (made.obs["cell_type_bgen"].astype(str) == whole.obs["cell_type_bgen"].astype(str)).all()
    for name in ("cell_type_probability", "cell_type_novelty"):
        np.testing.assert_allclose(made.obs[name], whole.obs[name], rtol=1e-3, atol=1e-5)
    assert list(made.uns["bgen_annotate"]["labels"]) == list(whole.obsm["cell_type_probabilities"].columns)
    np.testing.assert_allclose(made.obsm["cell_type_probabilities"], whole.obsm["cell_type_probabilities"], atol=1e-4)


def test_a_models_own_labels_are_told_in_blocks(bgen: Any, demo: Any, model: Model, tmp_path: Path) -> None:
    saved, labels = model.saved, ["T", "B", "NK"]
    annotator = Annotator(saved.vae, torch.ones(3))
    torch.nn.init.normal_(annotator.head.weight, generator=torch.Generator().manual_seed(0))
    about = saved.about.model_copy(update={"annotation": Annotation(label="kind", labels=labels)})
    save_model(replace(saved, module=annotator, about=about), tmp_path / "annotator")
    done = bgen("annotate", tmp_path / "annotator", demo.store, "--out", tmp_path / "out.zarr", "--threshold", 0.6)
    assert done.code == 0, done
    made = anndata.read_zarr(tmp_path / "out.zarr")
    whole = bgen_module_load(tmp_path / "annotator").annotate(str(demo.store), threshold=0.6)
    assert (made.obs["kind_bgen"].astype(str) == whole.obs["kind_bgen"].astype(str)).all()
    assert made.uns["bgen_annotate"]["abstained"] == whole.uns["bgen_annotate"]["abstained"] > 0
    assert "kind_novelty" not in made.obs


def bgen_module_load(folder: Path) -> Model:
    return bgen.load(folder)


def test_references_are_drawn_alike_and_none_is_lost(demo: Any, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened.of(demo.store, {})
    cells = opened.match(opened.find_counts(), model.saved, model.expected_shares())
    every, texts = reference.read_reference(cells, "cell_type")
    assert np.array_equal(every, np.arange(600))
    monkeypatch.setattr(reference, "MOST_CELLS", 100)
    some, labels = reference.read_reference(cells, "cell_type")
    monkeypatch.setattr(reference, "WINDOW", 77)
    again, _ = reference.read_reference(cells, "cell_type")
    assert np.array_equal(some, again)
    assert 100 <= len(some) < 160
    assert set(labels) == set(texts)
    assert min(np.unique(labels, return_counts=True)[1]) >= reference.OF_EACH
    assert np.array_equal(labels, texts[some])
    assert len(reference.read_reference(cells, "nothing")[0]) == 0


def test_named_genes_alone_are_denoised(bgen: Any, demo: Any, model: Model, tmp_path: Path) -> None:
    table = model.saved.genes
    names = [table["id"][7], table["symbol"][3]]
    for out in ("out.h5ad", "out.zarr"):
        done = bgen("denoise", demo.model, demo.cells, "--genes", ",".join(names), "--out", tmp_path / out)
        assert done.code == 0, done
    made, blocks = anndata.read_h5ad(tmp_path / "out.h5ad"), anndata.read_zarr(tmp_path / "out.zarr")
    assert set(made.var_names) == set(blocks.var_names) == {table["id"][7], table["id"][3]}
    assert blocks.layers["denoised"].shape == (600, 2)
    every = model.denoise(demo.cells)
    for found in (made, blocks):
        expected = every[:, found.var_names].layers["denoised"]
        np.testing.assert_allclose(found.layers["denoised"], expected, rtol=1e-3, atol=1e-5)
    assert np.array_equal(made.X.toarray(), every[:, made.var_names].X.toarray())  # the counts of these genes, too
    for out in ("no.h5ad", "no.zarr"):
        done = bgen("denoise", demo.model, demo.cells, "--genes", "G01O7", "--out", tmp_path / out)
        assert done.code == 2
        assert "The model knows no gene 'G01O7'. Did you mean" in " ".join(done.err.split())
        assert not (tmp_path / out).exists()
    lacking = anndata.read_h5ad(demo.cells)
    lacking = lacking[:, lacking.var_names != table["id"][7]].copy()
    with pytest.raises(UserError, match=f"The data does not have the gene '{table['id'][7]}'"):
        model.denoise(lacking, genes=names)


def test_wide_results_are_cut_into_batches(
    bgen: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bgen.tasks.blocks.folder.WIDE", 100)
    monkeypatch.setattr("bgen.tasks.blocks.run.BATCH", 64)
    write, written = Writer.write, []

    def noted(self: Writer, where: str, first: int, values: np.ndarray) -> None:
        written.append((where, len(values)))
        write(self, where, first, values)

    monkeypatch.setattr(Writer, "write", noted)
    done = bgen("denoise", demo.model, demo.cells, "--out", tmp_path / "wide.zarr")
    assert done.code == 0, done
    assert max(rows for where, rows in written if where == "layers/denoised") == 64  # none waits for its block to end
    layer = zarr.open_group(tmp_path / "wide.zarr", mode="r")["layers/denoised"]
    assert layer.chunks == (64, 120)
    assert len(list((tmp_path / "wide.zarr/layers/denoised").glob("*.0"))) == 10
    assert np.isfinite(layer[:]).all()


def test_covariates_of_some_cells_are_theirs(demo: Any, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cells, "WINDOW", 100)
    opened = Opened.of(demo.store, {})
    cells = opened.match(None, model.saved, model.expected_shares())
    names = dict.fromkeys(model.saved.codec.covariates, 1)
    every = cells.covariates(names, 0, 600)
    some = np.array([3, 99, 100, 101, 420, 599])
    for name, codes in cells.covariates_of(names, some).items():
        assert np.array_equal(codes, every[name][some])
    assert np.array_equal(cells.take(some).toarray(), model.read(str(demo.store)).counts[some].toarray())


def test_rows_of_a_store_are_read_without_the_others(demo: Any) -> None:
    store = open_store(demo.store)
    for rows in ((0, 600), (17, 402), (599, 600)):
        assert np.array_equal(store.names(rows), store.names()[slice(*rows)])
        for column in store.manifest.columns:
            assert np.array_equal(store.column(column, rows)[1], store.column(column)[1][slice(*rows)], equal_nan=True)
        assert np.array_equal(store.rows("split", rows), store.rows("split")[slice(*rows)])
    assert ROWS_CHUNK >= 32_768  # a block of cells lies in one file of names


def test_several_ranks_do_not_write_one_h5ad(demo: Any) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [prefork.python(), "-m", "bgen", "embed", str(demo.model), str(demo.cells), "--out", "x.h5ad"]
    done = subprocess.run(command, env={**os.environ, **place}, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "x.h5ad is made by one process. Several ranks share the cells with --out NAME.zarr." in done.stderr
