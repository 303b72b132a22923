"""Building: what is in the files is in the store, however the work was cut, shared out or interrupted."""

from __future__ import annotations

import gc
import resource
import shutil
import signal
import subprocess
import textwrap
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from made import contents_of, contents_of_files, hashes, random_counts, same_frames, small_pieces, write_h5ad
from prefork import python

from bgen.errors import UserError
from bgen.store.format.manifest import check_files
from bgen.store.store import Store
from data_tools.building import pieces, shuffle
from data_tools.building.build import build
from data_tools.building.partial import Interrupted
from data_tools.check.check import check
from data_tools.check.findings import Report
from data_tools.inputs import source as inputs


@pytest.fixture(scope="module")
def report(files: list[Path]) -> Report:
    return check(files)


@pytest.fixture(scope="module")
def whole_store(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed build writes."""
    store = tmp_path_factory.mktemp("whole") / "store"
    build(report, store, created_by="test")
    return store


@pytest.fixture(scope="module")
def whole(whole_store: Path) -> dict[str, str]:
    return hashes(whole_store)


@pytest.fixture(scope="module")
def store_in_pieces(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed build in small pieces writes."""
    store = tmp_path_factory.mktemp("in_pieces") / "store"
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        build(report, store, created_by="test")
    return store


@pytest.fixture(scope="module")
def in_pieces(store_in_pieces: Path) -> dict[str, str]:
    return hashes(store_in_pieces)


def test_the_store_holds_what_the_files_hold(files: list[Path], whole_store: Path) -> None:
    store = Store(whole_store)
    manifest = store.manifest
    assert check_files(store.folder, manifest, checksums=True) == []
    assert same_frames(contents_of(store), contents_of_files(files))
    assert store.manifest.n_genes == 800  # the union
    one, two = store.manifest.sources
    assert (one.genes, two.genes, one.kind, two.matrix, two.genes_left_out) == (700, 700, "h5ad", "X", 0)
    assert store.genes["cells"].is_monotonic_decreasing
    assert store.genes["cells"].sum() == manifest.n_nonzeros == len(contents_of_files(files))
    assert [path.name for path in whole_store.parent.iterdir()] == ["store"]


def test_how_the_input_is_cut_changes_nothing(
    report: Report, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_VALUES", 4000)
    monkeypatch.setattr(inputs, "CSC_VALUES", 3000)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 7000)
    steps: list[tuple[str, int, int]] = []
    build(report, tmp_path / "cut", created_by="test", progress=lambda *step: steps.append(step))
    assert hashes(tmp_path / "cut") == whole
    assert [step[0] for step in steps].count("reading") > 10
    assert steps[-1] == ("writing", 1401, 1401)


def test_shards_of_any_size_hold_the_same(files: list[Path], store_in_pieces: Path) -> None:
    store = Store(store_in_pieces)
    assert len(list((store_in_pieces / "gaps/c").iterdir())) == 3
    assert same_frames(contents_of(store), contents_of_files(files))


@pytest.fixture
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("where", ["workers", "scheduler"])
def test_dask_builds_the_same_store(where: str, report: Report, tmp_path: Path, whole, request) -> None:
    if where == "workers":
        build(report, tmp_path / "there", created_by="test", workers=2)
    else:
        build(report, tmp_path / "there", created_by="test", scheduler=request.getfixturevalue("cluster"))
    assert hashes(tmp_path / "there") == whole


def test_errors_of_workers_arrive(files: list[Path], tmp_path: Path, cluster: str) -> None:
    copy = Path(shutil.copy(files[0], tmp_path / "copy.h5ad"))
    report = check([copy])
    counts = random_counts(900, 1)
    counts.data[5000] = 0.5
    write_h5ad(copy, counts)
    with pytest.raises(UserError, match=r"copy.h5ad.*no counts"):
        build(report, tmp_path / "store", created_by="test", scheduler=cluster)
    assert [path.name for path in tmp_path.iterdir()] == ["copy.h5ad"]
    with pytest.raises(UserError, match="no Dask scheduler"):
        build(report, tmp_path / "store", created_by="test", scheduler="nowhere")


def test_a_build_leaves_dask_as_it_was(files: list[Path], tmp_path: Path, cluster: str) -> None:
    from distributed import default_client

    report = check(files[:1])
    gc.collect()
    gc.disable()  # which might take away what is left
    try:
        with pytest.raises(UserError, match="no Dask scheduler"):
            build(report, tmp_path / "store", created_by="test", scheduler="nowhere")
        with pytest.raises(ValueError, match="No clients found"):
            default_client()
        during = []

        def look(*_: object) -> None:
            with suppress(ValueError):
                during.append(default_client())

        build(report, tmp_path / "store", created_by="test", scheduler=cluster, progress=look)
        assert not during
    finally:
        gc.enable()


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    from data_tools.inputs import source
    from data_tools.building import pieces
    from data_tools.building import run_tasks
    from data_tools.building import shuffle
    from data_tools.building.build import build
    from data_tools.check.check import check

    pieces.PIECE_VALUES, source.CSC_VALUES, shuffle.SHARD_CHUNKS = 4000, 3000, 2
    tasks_left = int(sys.argv[1])
    plain = run_tasks.InProcess.run

    def run(self, task, arguments, work, done):
        def counted(*one):
            global tasks_left
            if tasks_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            tasks_left -= 1
            task(*one)
        plain(self, counted, arguments, work, done)

    run_tasks.InProcess.run = run
    build(check([Path(path) for path in sys.argv[3:]]), Path(sys.argv[2]), created_by="test")
"""


def start_build(tasks: int, out: Path, files: list[Path]) -> subprocess.CompletedProcess:
    command = [python(), "-c", textwrap.dedent(SCRIPT), str(tasks), str(out), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kills", [(30,), pytest.param((12, 30), marks=pytest.mark.slow)], ids=["once", "twice"])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(
    kills: tuple[int, ...],
    files: list[Path],
    tmp_path: Path,
    in_pieces: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_pieces(monkeypatch)
    out = tmp_path / "killed"
    for tasks in kills:  # tasks that were done return at once, and count here
        assert start_build(tasks, out, files).returncode == -signal.SIGKILL
        assert not out.exists()
    spills = sorted((tmp_path / ".killed.partial/build/spills").glob("*.streams"))
    before = [path.stat().st_mtime_ns for path in spills]
    (tmp_path / ".killed.partial/build/shards/00000.json").write_text("{")  # the shard was not finished
    spills[0].with_suffix(".cells").write_bytes(b"")  # nor was the piece

    seen: list[list[int]] = []
    build(
        check(files), out, created_by="test", progress=lambda *step: seen.append([p.stat().st_mtime_ns for p in spills])
    )
    assert seen[0][0] != before[0]
    assert seen[0][1:] == before[1:]
    assert hashes(out) == in_pieces
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]


def test_another_build_is_told_of_an_interrupted_one(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert start_build(3, out, files).returncode == -signal.SIGKILL
    report = check(files)
    with pytest.raises(UserError, match=r"differs from it in: the codec profile, the seed, the splits.*--restart"):
        build(report, out, created_by="test", seed=1, profile="fast")
    with pytest.raises(UserError, match=r"differs from it in: .*the input files"):
        build(check(files[:1]), out, created_by="test")
    manifest = build(report, out, created_by="test", seed=1, restart=True)
    assert manifest.seed == 1
    assert same_frames(contents_of(Store(out)), contents_of_files(files))


def test_two_builds_do_not_write_one_store(report: Report, tmp_path: Path) -> None:
    def second(*step: object) -> None:
        with pytest.raises(UserError, match="Another build is writing"):
            build(report, tmp_path / "store", created_by="test")

    build(report, tmp_path / "store", created_by="test", progress=second)
    with pytest.raises(UserError, match="there already"):
        build(report, tmp_path / "store", created_by="test")


def test_an_interruption_keeps_the_work(report: Report, tmp_path: Path) -> None:
    def stop(what: str, done: int, cells: int) -> None:
        if what == "measuring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(report, tmp_path / "store", created_by="test", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".store.partial"]
    build(report, tmp_path / "store", created_by="test")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_write_error_keeps_the_work(report: Report, tmp_path: Path, whole: dict[str, str]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        with pytest.raises(Interrupted, match=r"cannot be written.*kept in .*the same command goes on"):
            build(report, tmp_path / "store", created_by="test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    build(report, tmp_path / "store", created_by="test")
    assert hashes(tmp_path / "store") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    "megabytes", ["260k", *(pytest.param(other, marks=pytest.mark.slow) for other in ("100k", "420k"))]
)
def test_a_full_disk_keeps_the_work(report: Report, tmp_path: Path, whole: dict[str, str], megabytes: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(Interrupted, match=r"disk of .* is full.*the same command goes on"):
            build(report, disk / "store", created_by="test")
        assert [path.name for path in disk.iterdir()] == [".store.partial"]
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        build(report, disk / "store", created_by="test")
        assert hashes(disk / "store") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("where", ["reading", "work", pytest.param("writing", marks=pytest.mark.slow)])
def test_an_error_that_goes_over_keeps_the_work(
    where: str, files: list[Path], tmp_path: Path, in_pieces: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build goes on after a file that could not be read or written for a moment, and gives the same bytes."""
    small_pieces(monkeypatch)
    report = check(files)
    away = files[1].with_name("away")

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    def stop(what: str, done: int, total: int) -> None:
        if where == "reading" and what == "reading" and 900 <= done < total and files[1].exists():
            files[1].rename(away)
        elif where == "writing" and what == "measuring" and done == total:
            monkeypatch.setattr(shuffle, "write_shard_file", fail)
        elif where == "work" and what == "writing":
            raise RuntimeError("a fault of the program")

    expected = RuntimeError if where == "work" else Interrupted
    plain = shuffle.write_shard_file
    try:
        with pytest.raises(expected) as caught:
            build(report, tmp_path / "store", created_by="test", progress=stop)
    finally:
        if away.exists():
            away.rename(files[1])
    said = "".join(getattr(caught.value, "__notes__", [])) + str(caught.value)
    assert "the same command goes on with it" in said
    spills = sorted((tmp_path / ".store.partial/build/spills").glob("*.streams"))
    before = {path: path.stat().st_mtime_ns for path in spills}
    assert len(before) > 5
    monkeypatch.setattr(shuffle, "write_shard_file", plain)
    seen: list[dict[Path, int]] = []

    def look(*step: object) -> None:
        seen.append({path: path.stat().st_mtime_ns for path in spills})

    build(report, tmp_path / "store", created_by="test", progress=look)
    assert seen[0] == before
    assert hashes(tmp_path / "store") == in_pieces


def test_a_planted_work_folder_is_refused(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / ".store.partial").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="is a link, or another user's"):
        build(check(files), tmp_path / "store", created_by="test")
    assert list((tmp_path / "theirs").iterdir()) == []


def test_workers_open_no_port_and_end_with_the_build(files: list[Path], tmp_path: Path) -> None:
    script = """
        import os, sys
        from pathlib import Path
        from data_tools.building.build import build
        from data_tools.check.check import check

        def show(what, done, total):
            if what == "writing":
                print(os.getpid(), flush=True)
                sys.stdin.read()

        if __name__ == "__main__":
            report = check([Path(path) for path in sys.argv[2:]])
            build(report, Path(sys.argv[1]), created_by="test", workers=2, progress=show)
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(script))
    command = [python(), str(tmp_path / "main.py"), str(tmp_path / "store"), *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        builder = psutil.Process(int(process.stdout.readline()))
        family = [builder, *builder.children(recursive=True)]
        workers = [one for one in family[1:] if "spawn_main" in " ".join(one.cmdline())]
        assert workers
        assert [one for member in family for one in member.net_connections() if one.status == "LISTEN"] == []
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
