"""``bgen doctor``: whether this machine is ready, what falls back to something slower, and how to mend it."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import torch
from rich.table import Table
from rich.text import Text

from bgen.cpus import bound_to, cpus
from bgen.names import shown
from bgen.nn.scans.published_kernels import KERNELS, missing

Status = Literal["ok", "note", "warning", "error"]
COLOURS: dict[Status, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}

PACKAGES = ("torch", "deepspeed", "numpy", "numba", "anndata", "zarr", "tensorstore", "safetensors", "mlflow-skinny")
LAUNCHERS = ("torchrun", "deepspeed", "pdsh", "ssh", "sbatch", "kubectl", "sky")
RANK = "bgen.operate.doctor_rank"
PROBE_BYTES = 64_000_000
LITTLE_SPACE = 10e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is, whether it is well, what was found, and how to mend it."""

    name: str
    status: Status
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """All findings."""

    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        """Those with which training cannot work."""
        return [finding for finding in self.findings if finding.status == "error"]

    def as_json(self) -> list[dict[str, Any]]:
        """Return JSON values."""
        return [dataclasses.asdict(finding) for finding in self.findings]

    def table(self) -> Table:
        """Return what `bgen doctor` shows."""
        table = Table(show_header=False, box=None)
        for finding in self.findings:
            colour = COLOURS[finding.status]
            said = Text(shown(finding.text))
            if finding.fix:
                said.append(f"\n{shown(finding.fix)}", style="bold")
            table.add_row(Text(finding.status, style=colour), finding.name, said)
        return table


def doctor(folder: Path = Path(), *, timeout: float = 120.0) -> Report:
    """Look at everything.

    Parameters
    ----------
    folder
        Where run folders will be: its disk is tried.
    timeout
        Seconds that the two ranks may take.
    """
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        packages,
        devices,
        kernels,
        extensions,
        lambda: disk(folder),
        network,
        tracking,
        launchers,
        lambda: two_ranks(timeout),
    )
    return Report([finding for look in looks for finding in look()])


def packages() -> Iterator[Finding]:
    """What is installed."""
    found, absent = {}, []
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            absent.append(name)
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    yield Finding("packages", "ok", f"Python {platform.python_version()}, {listed}")
    if absent:
        yield Finding("packages", "error", f"not installed: {', '.join(absent)}", "pip install bgen-flow")


def devices() -> Iterator[Finding]:
    """GPUs, or what the CPU can do."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            text = f"{number}: {found.name}, {found.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
            old = found.major < 8
            fix = "bf16 is slow before compute capability 8: set train.precision=float32" if old else ""
            yield Finding("GPU", "warning" if old else "ok", text, fix)
    elif shutil.which("nvidia-smi"):
        fix = "Install torch for this driver's CUDA version: https://pytorch.org/get-started/locally"
        yield Finding("GPU", "error", f"there is a driver, but torch {torch.__version__} sees no GPU", fix)
    else:
        yield Finding("GPU", "note", "none: training and sampling run on the CPU")
    memory = psutil.virtual_memory()
    capability = torch.backends.cpu.get_cpu_capability()
    allowed = f"{cpus()} of {bound_to()} cores by quota" if cpus() < bound_to() else f"{cpus()} cores"
    text = f"{allowed} ({capability}), {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free"
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding("CPU", "ok", text + (f", OMP_NUM_THREADS={threads}" if threads else ""))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 4096:
        yield Finding("open files", "warning", f"at most {files}; stores have many", "ulimit -n 65536")


def kernels() -> Iterator[Finding]:
    """Which kernels the mixers of state-space models will use."""
    for mixer, (_, install) in KERNELS.items():
        reason = missing(mixer)
        if not torch.cuda.is_available():
            yield Finding(mixer, "ok", "torch, chunked: right for CPUs")
        elif reason is None:
            yield Finding(mixer, "ok", "mamba-ssm's fused kernels")
        else:
            fix = f"{install}\nor set {mixer}.backend to torch (slow)"
            yield Finding(mixer, "warning", f"no fused kernels ({reason}): a model with {mixer} will not start", fix)


def extensions() -> Iterator[Finding]:
    """Locks that a killed compilation left: a process that waits for one waits for ever."""
    default = Path.home() / ".cache" / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    stale = [lock for lock in root.glob("**/lock") if time.time() - lock.stat().st_mtime > 600]
    if stale:
        fix = "If nothing is being compiled: rm " + " ".join(map(str, stale))
        yield Finding("compiled extensions", "warning", f"{len(stale)} old lock(s) below {root}", fix)
    else:
        yield Finding("compiled extensions", "ok", f"no stale lock below {root}")


def disk(folder: Path) -> Iterator[Finding]:
    """Room and speed where checkpoints will be, and whether a folder can be renamed there, as a commit needs it."""
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(dir=folder, prefix=".bgen-doctor-") as made:
            work = Path(made) / "step.tmp"
            work.mkdir()
            block = os.urandom(1_000_000)
            begin = time.perf_counter()
            with (work / "file").open("wb") as stream:
                for _ in range(PROBE_BYTES // len(block)):
                    stream.write(block)
                os.fsync(stream.fileno())
            seconds = time.perf_counter() - begin
            work.rename(work.with_suffix(""))
    except OSError as error:
        fix = "Choose another out=, on a disk that you may write to and that has room."
        yield Finding("disk", "error", f"{folder.resolve()}: {error.strerror or error}", fix)
        return
    text = f"{folder.resolve()}: {free / 1e9:.1f} GB free, writes {PROBE_BYTES / 1e6 / seconds:.0f} MB/s"
    status: Status = "ok" if free > LITTLE_SPACE else "warning"
    yield Finding("disk", status, text, "" if status == "ok" else "`bgen plan` says how large a checkpoint is.")
    shared = Path("/dev/shm")
    if shared.is_dir() and (room := shutil.disk_usage(shared).total) < 1e9:
        fix = "Containers: --shm-size=8g, or an emptyDir with medium Memory."
        yield Finding("shared memory", "warning", f"/dev/shm has {room / 1e6:.0f} MB; NCCL needs more", fix)


def network() -> Iterator[Finding]:
    """What other hosts would see of this one."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        fix = f"Set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to one of: {', '.join(_interfaces()) or 'none is up'}"
        yield Finding("network", "warning", f"this host's name '{name}' has no address: several hosts cannot meet", fix)
        return
    if address.startswith("127."):
        others = ", ".join(_interfaces()) or "none is up"
        text = f"'{name}' is {address} to itself: fine on one host; on several, ranks would announce that address"
        yield Finding("network", "note", text, f"On several hosts set GLOO_SOCKET_IFNAME to one of: {others}")
    else:
        yield Finding("network", "ok", f"'{name}' is {address}")


def _interfaces() -> list[str]:
    """Network interfaces that are up, with an IPv4 address that other hosts can use."""
    up = psutil.net_if_stats()
    return [
        f"{name} ({entry.address})"
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.") and up[name].isup
    ]


def tracking() -> Iterator[Finding]:
    """Whether the MLflow server answers, if there is one."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        yield Finding("MLflow", "ok", "MLFLOW_TRACKING_URI is not set: runs go to sqlite beside the run folder")
        return
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        yield Finding("MLflow", "ok", f"runs go to {parts.scheme or 'the folder'} {parts.path or uri}")
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    where = f"{parts.hostname}:{port}"
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
        yield Finding("MLflow", "ok", f"{where} answers")
    except OSError as error:
        fix = "Training goes on without it, and `bgen track sync` sends what is missing later."
        yield Finding("MLflow", "warning", f"{where} does not answer ({error})", fix)


def launchers() -> Iterator[Finding]:
    """Which targets of `bgen launch` could be started from here."""
    beside = Path(sys.executable).parent
    there = [name for name in LAUNCHERS if shutil.which(name) or (beside / name).exists()]
    absent = [name for name in LAUNCHERS if name not in there]
    text = ", ".join(there) or "none"
    yield Finding("launchers", "ok", text + (f" (not here: {', '.join(absent)})" if absent else ""))


def two_ranks(timeout: float) -> Iterator[Finding]:
    """Start two ranks and let them sum 4 MB ten times; on GPUs by NCCL where there are two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--tee=3"]
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_source(), environment.get("PYTHONPATH")]))
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    begin = time.perf_counter()
    fix = "The last lines of each rank are above. A firewall on the loopback interface? Try GLOO_SOCKET_IFNAME=lo."
    # In a group of its own, so that on a time-out the ranks end with their launcher.
    process = subprocess.Popen(
        [*command, "-m", RANK],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        said, _ = process.communicate()
        yield Finding("two ranks", "error", f"did not sum within {timeout:g} s\n{_of_ranks(said)}", fix)
        return
    sums = [line.split(":sum ", 1)[1] for line in said.splitlines() if ":sum " in line]
    if process.returncode != 0 or not sums:
        yield Finding("two ranks", "error", f"failed with code {process.returncode}\n{_of_ranks(said)}", fix)
        return
    yield Finding("two ranks", "ok", f"{sums[0]}; started in {time.perf_counter() - begin:.0f} s")


def _of_ranks(said: str) -> str:
    """Return the last lines that the ranks themselves wrote, which torchrun marks, or else the launcher's."""
    lines = said.splitlines()
    return "\n".join(([line for line in lines if line.startswith("[default")] or lines)[-12:])


def _source() -> str:
    """Folder from which this bgen is imported, for the ranks."""
    return str(Path(__file__).resolve().parents[2])
