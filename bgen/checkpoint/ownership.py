"""Whose run folder it is: one job's at a time, however the job before it ended, also across hosts.

::

    run/lock/00000007.json   the seventh attempt at this run: its token, host and process
    run/lock/00000007.beat   a number that it counts up while it lives

The attempt with the highest number owns the folder; the file of the next number can be made only once, so two jobs
that start together do not both get it. A new attempt is refused while the last one lives: its process is there, or, on
another host, its beat goes on. An attempt that was taken for dead (frozen, cut off) and comes back finds a higher
number than its own before it commits anything, and stops. Clocks are not compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from bgen.checkpoint import files
from bgen.distributed import world as ranks
from bgen.distributed.patience import Work, wait
from bgen.errors import UserError

LOCK = "lock"
BEAT = 5.0
"""Seconds between two beats."""
SILENCE = 60.0
"""Seconds without a beat after which an attempt on another host counts as dead."""
DYING = 5.0
"""Seconds that a process of this host is given to be gone: one that was killed may still be giving its memory back."""
SHARING = 15.0
"""Seconds that the ranks have to see what the first one wrote: network file systems remember folders for a while."""

_NAME = re.compile(r"(\d{8})\.json")


class Superseded(UserError):
    """Another job took the run folder over; this one must not write there any more."""


@dataclass
class Attempt:
    """One attempt at a run, as its file says.

    Attributes
    ----------
    token
        Tells it from every other one.
    host, boot, namespace, process, born
        Where it runs: name of the host, its boot and process namespace, the process and when that began.
    checkpoint
        Step of the newest checkpoint when it began; None: there was none.
    fruitless
        Restarts by a launcher in a row, up to this one, without a new checkpoint.
    ended, done
        Whether it left the folder itself, and whether its training was complete then.
    """

    token: str
    host: str
    boot: str
    namespace: str
    process: int
    born: float
    checkpoint: int | None = None
    fruitless: int = 0
    ended: bool = False
    done: bool = False

    @classmethod
    def here(cls) -> Attempt:
        """Return a new attempt of this process."""
        process = os.getpid()
        return cls(uuid.uuid4().hex[:12], socket.gethostname(), _boot(), _namespace(), process, _born(process) or 0.0)

    def lives(self) -> bool | None:
        """Whether its process is there; None: it runs where that cannot be seen."""
        if (self.host, self.boot, self.namespace) != (socket.gethostname(), _boot(), _namespace()):
            return None
        born = _born(self.process)
        return born is not None and abs(born - self.born) < 1.0


class Owner:
    """The right of this job to write into a run folder.

    Attributes
    ----------
    token
        Of this attempt, the same on all ranks.
    fruitless
        See :class:`Attempt`.
    done
        To be set to True when training is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token, self.fruitless, self.done = "", 0, False
        self._lock = folder / LOCK
        self._number = 0
        self._attempt = Attempt.here()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._live, name="bgen-lock", daemon=True)

    def take(self) -> None:
        """Make this attempt the owner.

        Raises
        ------
        UserError
            If another job lives, or the folder cannot be written to.
        """
        try:
            self._lock.mkdir(parents=True, exist_ok=True)
            while not self._follow(*self._last()):
                pass  # another job was quicker
            for path in self._lock.iterdir():
                if not (path.name[:8].isdigit() and int(path.name[:8]) >= self._number):
                    path.unlink(missing_ok=True)  # of attempts that are over
            self._beat(0)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"The run folder {self.folder} cannot be written to: {reason}. Choose another out=."
            ) from None
        self._heart.start()

    def check(self) -> None:
        """Raise Superseded if another attempt owns the folder by now."""
        number, other = self._last()
        if number != self._number or other is None or other.token != self._attempt.token:
            who = f"process {other.process} on {other.host}" if other is not None else "another process"
            raise Superseded(
                f"{self.folder} was taken over by {who}: this job stopped, and its last steps are not saved. Let one"
                " job at a time work on a run."
            )

    def release(self) -> None:
        """Leave the folder to the next job."""
        self._stop.set()
        if self._heart.is_alive():
            self._heart.join(timeout=BEAT)  # a beat on its way would be written after the folder was left
        self._attempt.ended, self._attempt.done = True, self.done
        path = self._path(self._number)
        with contextlib.suppress(OSError):  # the next job sees that this process is gone, or that its beat has ended
            if path.exists():
                temporary = path.with_suffix(".new")
                temporary.write_text(json.dumps(asdict(self._attempt)), encoding="utf-8")
                temporary.replace(path)
            path.with_suffix(".beat").unlink(missing_ok=True)

    def _follow(self, number: int, last: Attempt | None) -> bool:
        """Become the attempt after ``number`` unless that lives; False if another one became it first."""
        if number and self._lives(number, last):
            who = f"process {last.process} on {last.host}" if last is not None else "another job"
            raise UserError(
                f"Another job is at work on {self.folder}: {who}. Wait for its end or stop it, or choose another out=."
            )
        mine = self._attempt
        newest = files.committed(self.folder / "checkpoints")
        mine.checkpoint = files.step_of(newest[0]) if newest else None
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if restarted and last is not None and not last.done and last.checkpoint == mine.checkpoint:
            mine.fruitless = last.fruitless + 1
        else:
            mine.fruitless = 0
        try:
            with self._path(number + 1).open("x", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(mine)))
        except FileExistsError:
            return False
        self._number, self.token, self.fruitless = number + 1, mine.token, mine.fruitless
        return True

    def _lives(self, number: int, attempt: Attempt | None) -> bool:
        if attempt is not None:
            if attempt.ended:
                return False
            deadline = time.monotonic() + DYING
            while (lives := attempt.lives()) and time.monotonic() < deadline and self._last()[0] == number:
                time.sleep(0.05)
                attempt = self._last()[1] or attempt
                if attempt.ended:
                    return False
            if lives is not None:
                return lives
        before, deadline = self._counted(number), time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if self._counted(number) != before:
                return True
            latest = self._last()
            if latest[0] != number or (latest[1] is not None and latest[1].ended):
                return False
        return False

    def _last(self) -> tuple[int, Attempt | None]:
        """Return the highest number and its attempt; 0 if there is none, None if its file cannot be read."""
        # Clients of network file systems list a folder from memory until they change something in it.
        probe = self._lock / f"look-{self._attempt.token}"
        probe.touch()
        probe.unlink(missing_ok=True)
        names = (_NAME.fullmatch(path.name) for path in self._lock.iterdir())
        number = max((int(name[1]) for name in names if name), default=0)
        try:
            return number, Attempt(**json.loads(self._path(number).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return number, None

    def _path(self, number: int) -> Path:
        return self._lock / f"{number:08d}.json"

    def _counted(self, number: int) -> str:
        try:
            return self._path(number).with_suffix(".beat").read_text(encoding="utf-8")
        except OSError:
            return ""

    def _beat(self, count: int) -> None:
        self._path(self._number).with_suffix(".beat").write_text(f"{count:012d}", encoding="utf-8")

    def _live(self) -> None:
        count = 0
        while not self._stop.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # a full or slow disk: the next beat may be heard
                self._beat(count)

    def seen_here(self, token: str, number: int) -> str | None:
        """Return what is wrong if this rank does not see what the first one wrote, or cannot write beside it."""
        path = self._path(number)
        deadline = time.monotonic() + SHARING
        while True:
            try:
                probe = self._lock / f"rank-{uuid.uuid4().hex[:12]}"
                probe.touch()
                probe.unlink()
                if json.loads(path.read_text(encoding="utf-8"))["token"] == token:
                    return None
                problem = "sees another run there"
            except FileNotFoundError:
                problem = "does not see what rank 0 wrote there"
            except (OSError, ValueError, KeyError) as error:
                problem = f"cannot use it ({getattr(error, 'strerror', None) or error})"
            if time.monotonic() > deadline:
                return problem
            time.sleep(0.2)

    @property
    def number(self) -> int:
        """Of this attempt."""
        return self._number


_held: dict[Path, Owner] = {}


@contextlib.contextmanager
def owning(folder: Path) -> Iterator[Owner]:
    """Within the context the run folder is this job's; all ranks enter together. Contexts of one folder may be nested.

    Raises
    ------
    UserError
        On every rank, if another job is at work there, if the folder cannot be written to, or if it is not the same
        folder on all ranks.
    """
    place = folder.absolute()
    if place in _held:
        yield _held[place]
        return
    owner, main = Owner(folder), ranks.current().is_main
    work = Work(owner.take if main else None)
    wait(work)
    if isinstance(work.error, Exception) and not isinstance(work.error, UserError):
        raise work.error
    problem, token, number, owner.fruitless = ranks.from_main(
        (None if work.error is None else str(work.error), owner.token, owner.number, owner.fruitless)
    )
    if problem is not None:
        raise UserError(problem)
    owner.token = token
    try:
        _require_shared(owner, token, number)
        _held[place] = owner
        yield owner
    finally:
        _held.pop(place, None)
        if main:
            owner.release()


def _require_shared(owner: Owner, token: str, number: int) -> None:
    seen = None if ranks.current().is_main else owner.seen_here(token, number)
    wrong = [f"rank {rank} on {host} {text}" for rank, (host, text) in enumerate(_tell(seen)) if text is not None]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"The run folder {owner.folder} is not one folder for all ranks: {'; '.join(wrong[:3])}{more}. Put out= on"
            " a file system that all hosts share and may write to."
        )


def _tell(seen: str | None) -> list[tuple[str, str | None]]:
    return ranks.gather((socket.gethostname(), seen))


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(int(psutil.boot_time()))


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _born(process: int) -> float | None:
    """When a process began; None if there is none, or it is dead and only waits to be buried."""
    try:
        # Clock ticks since the boot, after the name in brackets: unlike seconds, they do not move with the clock.
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except OSError:
        pass
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.Error:
        return None
