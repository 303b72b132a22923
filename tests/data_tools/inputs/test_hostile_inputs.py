"""Files from elsewhere may be damaged or made to do harm: they are read, or refused with one message."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata import AnnData

from bgen.data.loader import CountReader
from bgen.errors import UserError
from bgen.files import write_h5ad
from bgen.store.anndata_store import CsrStore
from data_tools.check.check import check
from data_tools.inputs.registry import open_source

N, G = 60, 40


def make_cells(layout: str = "csr", dtype: str = "float32") -> anndata.AnnData:
    rng = np.random.default_rng(0)
    counts = sp.random(N, G, density=0.3, format="csr", rng=rng, dtype=np.float64)
    counts.data = np.ceil(rng.lognormal(1, 1, counts.nnz)).astype(dtype)
    counts = counts + sp.csr_matrix((np.ones(N, dtype), (np.arange(N), np.zeros(N, int))), shape=(N, G))
    matrix: Any = counts.toarray() if layout == "dense" else counts.asformat(layout)
    obs = pd.DataFrame({"celltype": rng.choice(["a", "b"], N)}, index=[f"c{i}" for i in range(N)])
    var = pd.DataFrame(index=[f"GENE{i:05d}" for i in range(G)])
    return anndata.AnnData(matrix, obs=obs, var=var, uns={"organism": "synthetic"})


@pytest.fixture(scope="module", params=["csr", "csc"])
def plain_h5ad(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("h5ad") / f"{request.param}.h5ad"
    make_cells(request.param).write_h5ad(path)
    return path


def errors_of(path: Path) -> str:
    """What the check says; it must not raise, whatever the file holds."""
    report = check([path])
    return "; ".join(finding.message for finding in report.errors)


def put(name: str, change: Callable[[np.ndarray], np.ndarray], **options: Any) -> Callable[[h5py.Group], None]:
    def harm(file: h5py.Group) -> None:
        values = change(file[name][:])
        del file[name]
        file.create_dataset(name, data=values, **options)

    return harm


def at(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.int64)
        values[place] = value
        return values

    return change


def huge(name: str, n: int, dtype: str = "f8", **options: Any) -> Callable[[h5py.Group], None]:
    """A dataset of n values that takes almost nothing in the file."""

    def harm(file: h5py.Group) -> None:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, (n,), dtype, compression="gzip", **options)
        file[name].attrs.update(attributes)

    return harm


@pytest.mark.parametrize(
    "harm",
    [
        put("X/indices", at(7, 10**6)),
        put("X/indices", at(7, -5)),
        put("X/indices", at(7, 2**32 + 3)),
        put("X/indices", lambda values: values.astype(np.float32)),
        put("X/indices", lambda values: values[:-3]),
        put("X/indptr", at(3, -4)),
        put("X/indptr", at(3, 10**9)),
        put("X/indptr", at(-1, 10**9)),
        put("X/indptr", at(0, 5)),
        put("X/indptr", lambda values: values[::-1]),
        put("X/indptr", lambda values: values[:-1]),
        put("X/indptr", lambda values: values[None]),
        put("X/data", lambda values: values.astype("S4")),
        put("X/data", lambda values: values.astype(np.complex64)),
        huge("obs/_index", 10**9, "S8"),
        huge("obs/celltype/codes", 10**9, "i8"),
        huge("X/indptr", 10**12, "i8", chunks=(1 << 16,)),
        huge("X/data", 1 << 40, "f4", chunks=(1 << 29,)),
        lambda file: file["X"].attrs.update(shape=[10**15, 10**15]),
        lambda file: file["X"].attrs.update(shape=[-1, G]),
        lambda file: file["X"].attrs.pop("shape"),
        lambda file: file["obs"].attrs.update({"column-order": ["nothing"]}),
        lambda file: file["obs"].attrs.update({"encoding-type": "spectrum"}),
        put("obs/celltype/codes", lambda values: np.full(N, 77, np.int8)),
    ],
)
def test_a_damaged_h5ad_is_one_error(harm: Callable[[h5py.File], None], plain_h5ad: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(plain_h5ad, tmp_path / "copy.h5ad"))
    with h5py.File(copy, "a") as file:
        harm(file)
    assert errors_of(copy)
    with pytest.raises(UserError, match=r"copy\.h5ad"):
        for _ in open_source(copy).iterate("X"):
            pass


def link_out(file: h5py.File, other: Path) -> None:
    with h5py.File(other, "w") as elsewhere:
        elsewhere["data"] = np.ones(file["X/data"].shape[0], np.float32)
    del file["X/data"]
    file["X/data"] = h5py.ExternalLink(str(other), "data")


def store_outside(file: h5py.File, other: Path) -> None:
    other.write_bytes(b"secret  " * N)
    del file["obs/_index"]
    file.create_dataset("obs/_index", (N,), "S8", external=[(str(other), 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File, other: Path) -> None:
    size = file["X/data"].shape[0]
    with h5py.File(other, "w") as elsewhere:
        elsewhere["data"] = np.ones(size, np.float32)
    layout = h5py.VirtualLayout((size,), "f4")
    layout[:] = h5py.VirtualSource(str(other), "data", (size,))
    del file["X/data"]
    file.create_virtual_dataset("X/data", layout)


@pytest.mark.parametrize("lead_out", [link_out, store_outside, virtual])
def test_an_h5ad_reads_no_other_file(
    lead_out: Callable[[h5py.File, Path], None], plain_h5ad: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(plain_h5ad, tmp_path / "copy.h5ad"))
    with h5py.File(copy, "a") as file:
        lead_out(file, tmp_path / "other")
    assert "lie in another file" in errors_of(copy)
    with pytest.raises(UserError, match="lie in another file"):
        open_source(copy)


def test_links_within_an_h5ad_are_followed(plain_h5ad: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(plain_h5ad, tmp_path / "copy.h5ad"))
    with h5py.File(copy, "a") as file:
        file.move("X/data", "uns/values")
        file["X/data"] = h5py.SoftLink("/uns/values")
    assert not errors_of(copy)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(dtype, layout, marks=[] if number % 3 == place else [pytest.mark.slow])
        for number, dtype in enumerate([">f4", ">i4", ">u2", "f2", "<i8", "u1"])
        for place, layout in enumerate(["csr", "csc", "dense"])
    ],
)
def test_values_of_any_number_type_are_read(dtype: str, layout: str, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    cells = make_cells(layout)
    cells.write_h5ad(path)
    name = "X" if layout == "dense" else "X/data"
    with h5py.File(path, "a") as file:
        values, attributes = file[name][:], dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values.astype(dtype))
        file[name].attrs.update(attributes)
    assert not errors_of(path)
    found = sp.vstack([block for _, block in open_source(path).iterate("X")])
    assert abs(found - sp.csr_matrix(cells.X)).nnz == 0


@pytest.mark.parametrize("place", [("indices", 10**6), ("indices", -1), ("indptr", -4), ("indptr", 10**9)])
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_damaged_matrix_in_memory_is_one_error(layout: str, place: tuple[str, int]) -> None:
    cells = make_cells(layout)
    getattr(cells.X, place[0])[3] = place[1]
    (finding,) = check([cells]).errors
    assert "indptr does not ascend" in finding.message or "numbers of genes or cells" in finding.message


def write_zarr(path: Path, version: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what will be the default, and that consolidated metadata are not yet standard
        group = zarr.open_group(path, mode="w", zarr_format=version)  # type: ignore[arg-type]
        anndata.io.write_elem(group, "/", make_cells())
        zarr.consolidate_metadata(path)
    return path


def array_of(folder: Path, name: str) -> str:
    """Return where the values of a column lie: from anndata 0.13 on texts are a group of values and a mask."""
    return f"{name}/values" if (folder / name / "values").is_dir() else name


def edit(name: str, **values: object) -> Callable[[Path], None]:
    """Change what the metadata of an array say, its own and those that were consolidated."""

    def harm(folder: Path) -> None:
        array = folder / array_of(folder, name)
        own = array / (".zarray" if (array / ".zarray").is_file() else "zarr.json")
        own.write_text(json.dumps(json.loads(own.read_text()) | values))

    return harm


def poke(name: str, place: int, value: int) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        array: Any = zarr.open_group(folder, mode="a", use_consolidated=False)[name]
        values = array[:]
        values[place] = value
        array[:] = values

    return harm


def pickle_in(folder: Path) -> None:
    edit("obs/_index", compressor={"id": "pickle", "protocol": 5})(folder)


def pickle_in_consolidated(folder: Path) -> None:
    path = folder / ".zmetadata"
    tree = json.loads(path.read_text())
    tree["metadata"][f"{array_of(folder, 'obs/_index')}/.zarray"]["compressor"] = {"id": "pickle", "protocol": 5}
    path.write_text(json.dumps(tree))


def much_in_consolidated(folder: Path) -> None:
    path = folder / ".zmetadata"
    tree = json.loads(path.read_text())
    tree["metadata"][f"{array_of(folder, 'obs/_index')}/.zarray"]["shape"] = [10**11]
    path.write_text(json.dumps(tree))


def link_chunk(folder: Path) -> None:
    (chunk,) = (folder / "X/data").glob("[0-9]*")
    moved = chunk.rename(folder.parent / "elsewhere")
    chunk.symlink_to(moved)


@pytest.mark.parametrize(
    ("version", "harm", "message"),
    [
        (2, pickle_in, "encoded with 'pickle'"),
        (2, pickle_in_consolidated, "encoded with 'pickle'"),
        (2, edit("X/data", filters=[{"id": "msgpack2"}]), "encoded with 'msgpack2'"),
        (3, edit("X/data", codecs=[{"name": "numcodecs.pickle", "configuration": {}}]), "encoded with"),
        (2, much_in_consolidated, "would take"),
        (2, link_chunk, "is a link that leads out"),
        (2, edit("X/data", chunks=[5 * 10**9]), "a chunk of it holds"),
        (2, edit("X/data", chunks=[0]), "is damaged"),
        (2, edit("X/indices", shape=[10**15]), ""),
        (2, edit("X/indptr", shape=[10**12]), "would take"),
        (2, edit("obs/_index", shape=[10**10]), "would take"),
        (3, edit("X/indptr", shape=[10**12]), "would take"),
        (3, edit("X/data", chunk_grid=[]), "is damaged"),
        (3, edit("X/data", shape=None), "is damaged"),
        (2, poke("X/indices", 5, 10**6), "numbers of genes or cells"),
        (2, poke("X/indices", 5, -2), "numbers of genes or cells"),
        (3, poke("X/indptr", 5, -2), "indptr does not ascend"),
        (2, poke("X/indptr", -1, 10**6), "indptr does not ascend"),
    ],
)
def test_a_damaged_zarr_is_one_error(version: int, harm: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "cells.zarr", version)
    harm(path)
    assert message in errors_of(path)
    with pytest.raises(UserError):
        for _ in open_source(path).iterate("X"):
            pass
    with pytest.raises(UserError, match=r"cells\.zarr"):
        CountReader(CsrStore(path)).read_cells(np.arange(N))


@pytest.mark.parametrize("version", [2, 3])
def test_texts_take_the_memory_that_their_bytes_explain(version: int, tmp_path: Path) -> None:
    """A chunk of texts that says that it holds 2^30 of them is refused before there is room for so many."""
    cells = make_cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which version of zarr will be the default
        anndata.io.write_elem(zarr.open_group(tmp_path / "cells.zarr", mode="w", zarr_format=version), "/", cells)
    group: Any = zarr.open_group(tmp_path / "cells.zarr", mode="r")
    name = (
        "obs/_index" if isinstance(group["obs/_index"], zarr.Array) else "obs/_index/values"
    )  # as anndata 0.13 has it
    texts, attributes = group[name][...], dict(group[name].attrs)
    where = tmp_path / "cells.zarr" / name
    made = zarr.create_array(where, shape=texts.shape, dtype=str, compressors=None, zarr_format=version, overwrite=True)
    made[...] = texts
    made.attrs.update(attributes)
    assert errors_of(tmp_path / "cells.zarr") == ""
    (chunk,) = (file for file in where.rglob("*") if file.is_file() and file.name == "0")
    chunk.write_bytes((1 << 30).to_bytes(4, "little") + chunk.read_bytes()[4:])
    assert "says that it holds 1,073,741,824 texts" in errors_of(tmp_path / "cells.zarr")


@pytest.mark.parametrize("where", ["name", "category", "gene", "column", "text"])
def test_a_text_with_a_nul_is_refused_before_anything_is_made_of_it(where: str, tmp_path: Path) -> None:
    cells = make_cells()
    if where == "name":
        cells.obs_names = ["c\0", *cells.obs_names[1:]]
    elif where == "gene":
        cells.var_names = ["G\0", *cells.var_names[1:]]
    elif where == "category":
        cells.obs["celltype"] = pd.Categorical(cells.obs["celltype"].replace("a", "a\0"))
    elif where == "column":
        cells.obs["a\0"] = 1
    else:
        cells.obs["note"] = ["x\0y", *["z"] * (N - 1)]
    with pytest.raises(UserError, match=r"holds a NUL character. The file is damaged"):
        open_source(cells)
    with pytest.raises(UserError, match="holds a NUL character"):
        write_h5ad(AnnData(cells.X, uns={"said": "x\0y"}), tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()
