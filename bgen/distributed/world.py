"""The ranks of a run: start-up, time-outs, and the few collectives that the rest of bgen uses.

A process learns its place from the environment that `torchrun` and the `deepspeed` launcher both set (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without it, the run is one process and opens no port.
"""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bgen.cpus import cpus, threads_are_free
from bgen.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes
    ----------
    rank, size
        Number of this process, and of processes in all.
    local_rank, local_size
        The same on this host.
    device
        Where this rank computes.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that writes and speaks."""
        return self.rank == 0


T = TypeVar("T")
_world: World | None = None
_on_cpu = False


def read_world() -> World:
    """Read the launcher's environment variables; starts nothing.

    Raises
    ------
    UserError
        If only some of them are set, one is no number, or a rank is not below the number of ranks.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        rank, size, local_rank, local_size = 0, 1, 0, 1
    elif missing:
        raise UserError(
            f"the launcher's environment is incomplete: {', '.join(missing)} not set. Start with torchrun or "
            "deepspeed, or unset RANK and WORLD_SIZE for a single process."
        )
    else:
        rank, size, local_rank = (_number(name) for name in names[:3])
        given = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), None)
        local_size = size if given is None else _number(given)
        if not 0 <= rank < size:
            raise UserError(f"RANK is {rank}, but WORLD_SIZE is {size}: ranks count from 0 to {size - 1}.")
    if torch.cuda.is_available() and not _on_cpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}. Start as many "
                "processes per host as there are GPUs, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on CPUs."
            )
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    return World(rank, size, local_rank, local_size, device)


def device_of(name: str) -> torch.device:
    """Return the device that a user means.

    Parameters
    ----------
    name
        "cpu", "cuda" (this rank's GPU), "cuda:1" (that one), "mps" (Apple's), or "auto": a GPU with CUDA if there is
        one, else the CPU.

    Raises
    ------
    UserError
        If there is no such device here.
    """
    kind, _, number = name.partition(":")
    if name == "auto":
        return read_world().device
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device mps: torch finds no GPU of Apple here. Take cpu, or auto.")
        return torch.device("mps")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UserError(f"There is no device '{name}': it is auto, cpu, cuda, cuda:NUMBER or mps.")
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU here"
        raise UserError(f"device {name}: {why}. Take cpu, or auto; `bgen doctor` says what is there.")
    count = torch.cuda.device_count()
    if number and int(number) >= count:
        raise UserError(f"device {name}: this host shows {count} GPUs, numbered from 0.")
    return torch.device("cuda", int(number) if number else read_world().local_rank % count)


def compute_on(name: str) -> torch.device:
    """Let this process's rank compute on the device that a user means, and return it.

    Raises
    ------
    UserError
        As :func:`device_of`.
    """
    global _on_cpu
    _on_cpu = name == "cpu"
    return device_of(name)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(
            f"the environment variable {name} is {os.environ[name]!r}, not a number. Start with torchrun or deepspeed, "
            "which set it, or unset RANK and WORLD_SIZE for a single process."
        ) from None


def start(timeout: float = 600.0) -> World:
    """Meet the other ranks and return this process's place; a second call returns the same.

    Parameters
    ----------
    timeout
        Seconds that the ranks have for meeting, and for each collective until :func:`set_timeout` changes that.

    Raises
    ------
    UserError
        If the environment is incomplete, or the ranks did not meet in time.
    """
    global _world
    if _world is not None:
        return _world
    world = read_world()
    _allow_many_files()
    backend = "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        backend = "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    if world.size == 1 and "RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; the others would make later children think otherwise
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    else:
        if world.local_size == world.size:
            # One host: the loopback interface always works, the one that the host's name resolves to may not.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
        try:
            dist.init_process_group(backend, timeout=limit)
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
            raise UserError(
                f"rank {world.rank} did not meet the other {world.size - 1} at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} within {timeout:g} s. Check that all were started, with the same "
                f"address, and that the port is open. ({str(error).splitlines()[0]})"
            ) from error
    _share_cores(world)
    _world = world
    return world


def _allow_many_files() -> None:
    """Raise the number of files that this process may open as far as it may: every rank is a socket in every group.

    Of 512 ranks, two groups take 1,022, and 1,024 is the usual limit.
    """
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS says that there is no limit, and then refuses to take it away
        pass


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


def _share_cores(world: World) -> None:
    """Divide a CPU host's CPUs among its ranks, unless the user set how many threads each takes."""
    if world.device.type == "cpu" and world.local_size > 1 and threads_are_ours(world):
        torch.set_num_threads(max(1, cpus() // world.local_size))


def threads_are_ours(world: World) -> bool:
    """Return whether the user left the number of threads to bgen; of several ranks, torchrun sets 1 unasked."""
    return threads_are_free() or (world.local_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1")


def current() -> World:
    """The place of this process; :func:`start` must have run."""
    assert _world is not None, "bgen.distributed.world.start() has not run"
    return _world


def stop() -> None:
    """Leave the group; harmless when there is none."""
    global _world
    if _world is not None:
        dist.destroy_process_group()
        _world = None


def set_timeout(seconds: float) -> None:
    """Change how long a collective may take from now on; start-up needs longer than a step.

    This applies to every process group, also to those that DeepSpeed made for itself.
    """
    from torch.distributed import distributed_c10d

    if current().size > 1:
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def barrier() -> None:
    """Wait for all ranks."""
    if current().size > 1:
        dist.all_reduce(torch.zeros(1))


def all_sum(values: Tensor) -> Tensor:
    """Sum a CPU tensor over ranks; returns a new tensor, bitwise the same on each rank."""
    total = values.clone()
    if current().size > 1:
        dist.all_reduce(total)
    return total


def agree_max(flag: int | bool) -> int:
    """The largest flag of all ranks."""
    if current().size == 1:
        return int(flag)
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def agree_min(flag: int | bool) -> int:
    """The smallest flag of all ranks."""
    return -agree_max(-int(flag))


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. For small things that pickle."""
    if current().size == 1:
        return [value]
    values: list[T | None] = [None] * current().size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_main(value: T) -> T:
    """Rank 0's value on every rank. For small things that pickle."""
    return gather(value)[0]
