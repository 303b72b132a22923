"""Files on which the HDF5 library itself hangs or crashes end in one message."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

from bgen.errors import UserError
from data_tools.inputs import hdf5_probe
from data_tools.inputs.hdf5_probe import require_readable
from data_tools.inputs.registry import open_source


@pytest.fixture
def file(tmp_path: Path) -> Path:
    cells = anndata.AnnData(np.ones((5, 3), np.float32))
    cells.obs["type"] = ["a", "b", "a", "b", "a"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_one_process_looks_at_many_files(file: Path, tmp_path: Path) -> None:
    for _ in range(3):
        require_readable(file)
    first = hdf5_probe._probes[0].process.pid
    open_source(file)
    assert hdf5_probe._probes[0].process.pid == first
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["nothing"] = h5py.Empty("f4")
        other["text"] = "one"
        other["gone"] = h5py.SoftLink("/nowhere")
    require_readable(tmp_path / "other.h5")


def test_what_it_cannot_read_is_told(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cells\.h5ad: cannot be read \(.*Is the file damaged or cut off\?"):
        open_source(file)
    file.write_bytes(whole)
    open_source(file)


def test_a_library_that_hangs_or_crashes_is_ended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_readable(file)
    monkeypatch.setattr(hdf5_probe, "PATIENCE", 0.5)
    os.kill(hdf5_probe._probes[0].process.pid, signal.SIGSTOP)  # as one that loops for ever
    with pytest.raises(UserError, match="has not come back for"):
        require_readable(file)
    monkeypatch.undo()
    require_readable(file)
    hdf5_probe._probes[0].process.kill()
    hdf5_probe._probes[0].process.wait()
    with pytest.raises(UserError, match="the HDF5 library crashed"):
        require_readable(file)
    require_readable(file)


@pytest.mark.parametrize(("rows", "length"), [(4000, 100_000), (200_000, 3_000_000)], ids=["many", "no memory for it"])
def test_texts_that_share_their_bytes_are_refused(rows: int, length: int, tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    with h5py.File(path, "w") as file:
        texts = file.create_dataset("barcodes", rows, h5py.string_dtype(), chunks=(rows,))
        texts[0] = "A" * length
        at = texts.id.get_chunk_info(0)
        place = texts.id.read_direct_chunk(at.chunk_offset)[1][:16]  # of the text: its length, and where it lies
        texts.id.write_direct_chunk(at.chunk_offset, place * rows)
    with pytest.raises(UserError, match=r"cells\.h5ad: cannot be read \(.*(share bytes|memory allocation failed)"):
        require_readable(path)
