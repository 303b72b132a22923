"""A build of a thousand small files that is killed again and again gives the bytes of one that was not."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from bgen.store.format.manifest import hash_folder, read_manifest
from data_tools.building import shuffle
from data_tools.building.build import build
from data_tools.check.check import check

FILES, KILLS = 1000, 20

SCRIPT = """
    import pickle, sys
    from pathlib import Path
    from data_tools.building import shuffle
    from data_tools.building.build import build

    shuffle.SHARD_CHUNKS = 4
    report = pickle.loads(Path(sys.argv[1]).read_bytes())
    print("ready", flush=True)
    build(report, Path(sys.argv[2]), created_by="test", workers=0)
"""


def write_files(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    files = []
    for number in range(FILES):
        counts = rng.poisson(0.3, (12, 300)).astype(np.float32)
        counts[:, 0] = 1  # no cell is empty
        obs = pd.DataFrame(index=[f"{number}-{i}" for i in range(12)])
        var = pd.DataFrame(index=[f"GENE{i:05d}" for i in range(300)])
        files.append(folder / f"{number:04d}.h5ad")
        anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var, uns={"organism": "synthetic"}).write_h5ad(files[-1])
    return files


@pytest.mark.slow
def test_a_thousand_files_killed_twenty_times_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "SHARD_CHUNKS", 4)
    report = check(write_files(tmp_path))
    assert not report.errors
    (tmp_path / "report").write_bytes(pickle.dumps(report))
    begin = time.monotonic()
    build(report, tmp_path / "undisturbed", created_by="test", workers=0)
    seconds = time.monotonic() - begin
    expected = hash_folder(tmp_path / "undisturbed"), read_manifest(tmp_path / "undisturbed")

    draw, kills, builds = random.Random(0), 0, 0
    while kills < KILLS or not (tmp_path / f"store{builds}").exists():
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "report")]
        with subprocess.Popen([*command, str(tmp_path / f"store{builds}")], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            try:
                wait = draw.uniform(0, seconds / 8) if kills < KILLS else None
                assert process.wait(wait) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                continue
        found = hash_folder(tmp_path / f"store{builds}"), read_manifest(tmp_path / f"store{builds}")
        assert found == expected
        builds += kills < KILLS
    assert kills == KILLS
    found = hash_folder(tmp_path / f"store{builds}"), read_manifest(tmp_path / f"store{builds}")
    assert found == expected
