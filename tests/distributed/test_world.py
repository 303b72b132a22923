from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prefork import python

from bgen.distributed import world as ranks
from bgen.distributed.report import report_user_error
from bgen.distributed.signals import StopSignals
from bgen.errors import UserError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    yield
    ranks.stop()


def launched(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_one_process_needs_no_environment_and_opens_no_port() -> None:
    world = ranks.start(10)
    assert (world.rank, world.size, world.local_rank, world.local_size, world.is_main) == (0, 1, 0, 1, True)
    assert ranks.start(10) is world
    assert ranks.current() is world
    assert ranks.agree_max(3) == ranks.agree_min(3) == 3
    assert ranks.gather("x") == ["x"]
    assert ranks.from_main([1]) == [1]
    assert ranks.all_sum(torch.tensor([1.5])).item() == 1.5
    ranks.barrier()
    ranks.set_timeout(5)
    assert "RANK" not in os.environ


def test_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(
        monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="h", MASTER_PORT="1", LOCAL_WORLD_SIZE="4"
    )
    world = ranks.read_world()
    assert (world.rank, world.size, world.local_rank, world.local_size, world.is_main) == (5, 8, 1, 4, False)


def test_an_environment_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, RANK="0", WORLD_SIZE="2")
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        ranks.read_world()
    launched(monkeypatch, RANK="2", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="1")
    with pytest.raises(UserError, match="RANK is 2, but WORLD_SIZE is 2"):
        ranks.read_world()


def test_a_variable_that_is_no_number_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(monkeypatch, RANK="x", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="1")
    with pytest.raises(UserError, match="the environment variable RANK is 'x', not a number"):
        ranks.read_world()
    assert report_user_error(UserError("bad")) == 2
    assert capsys.readouterr().err == "error: bad\n"


def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        ranks.start(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_ranks_that_do_not_meet_are_told_where_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched(monkeypatch, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"rank 0 did not meet the other 1 at 127.0.0.1:{port} within 1 s"):
        ranks.start(1)
    assert time.monotonic() - begin < 300  # torch's own limit is ten minutes


TWO = """
import os, sys, time
from bgen.distributed import world as ranks
import torch
world = ranks.start(300)
assert ranks.agree_max(world.rank == 1) == 1 and ranks.agree_min(world.rank) == 0
assert ranks.gather(world.rank * 10) == [0, 10] and ranks.from_main(world.rank) == 0
assert ranks.all_sum(torch.tensor([1.0, world.rank])).tolist() == [2.0, 1.0]
ranks.set_timeout(3)
if world.rank == 1:
    sys.stdin.read()  # until it is killed
begin = time.monotonic()
try:
    ranks.barrier()
except RuntimeError as error:
    print("timed out", time.monotonic() - begin, flush=True)
    os._exit(0)
"""


def test_collectives_and_the_second_time_out() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [python(), "-c", TWO],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said, _ = processes[0].communicate(timeout=250)
        assert processes[0].returncode == 0
        assert said.startswith("timed out")
        assert 2.5 < float(said.split()[2]) < 200
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signals_set_a_flag_and_the_old_handlers_return(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number.name
    assert signal.getsignal(number) is before


def test_rank_0_speaks_for_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_user_error(UserError("bad")) == 2
    assert capsys.readouterr().err == "error: bad\n"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("bgen.distributed.report.PATIENCE", 0.01)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert report_user_error(UserError("only here")) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err == "error (rank 3): only here\n"


def test_rank_0_waits_until_its_neighbours_have_found_the_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    launched(monkeypatch, RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(report_user_error(UserError("bad"))))
    thread.start()
    deadline = time.monotonic() + 300
    while not (tmp_path / "0" / "mistake").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.join(0.2)
    assert thread.is_alive()
    (tmp_path / "1" / "mistake").touch()
    thread.join(300)
    assert done == [2]
    assert capsys.readouterr().err == "error: bad\n"


MISTAKE = """
import os, sys
from pathlib import Path
from bgen.distributed.report import report_user_error
from bgen.errors import UserError
class Failure(UserError):
    exit_code = 2 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" else 75
Path(sys.argv[1], f"life_{os.environ['TORCHELASTIC_RESTART_COUNT']}").touch()
sys.exit(report_user_error(Failure("bad")))
"""


def test_a_mistake_ends_torchrun_and_a_full_disk_does_not(tmp_path: Path) -> None:
    """Of three lives, the first ends with a full disk's code and the second with a mistake's."""
    script = tmp_path / "script.py"
    script.write_text(MISTAKE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2", str(script)]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: bad") == 2, done.stderr
    assert {path.name for path in tmp_path.glob("life_*")} == {"life_0", "life_1"}
