"""A Slurm of two nodes and a controller on hosts made of namespaces, from the distribution's own packages."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from pathlib import Path

from hosts import Hosts

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "munged")

# Two partitions: jobs in `urgent` take the nodes from jobs in `patient`, which get SIGTERM and 100 s.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=h2
SlurmUser=root
AuthType=auth/munge
# Requeued jobs wait until their old credential has expired.
AuthInfo=socket=/run/munge.socket,cred_expire=10
CredType=cred/munge
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=h0,h1 CPUs=1 State=UNKNOWN
PartitionName=patient Nodes=h0,h1 Default=YES PriorityTier=1 GraceTime=100
PartitionName=urgent Nodes=h0,h1 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there is no Slurm here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: slurmctld, slurmd, slurm-client, munge)"
    return None


class Slurm:
    """Slurm on h0 and h1, its controller on h2; ends with the hosts."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        (folder / "state").mkdir(parents=True)
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        # Nothing here uses control groups, but slurmd looks for them unless told which.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[str]] = []
        for name in hosts.names:
            files = {"key-file": key, "log-file": folder / f"munged_{name}.log"}
            files |= {f"{kind}-file": f"/run/munge.{kind}" for kind in ("pid", "seed")} | {
                "socket": "/run/munge.socket"
            }
            options = " ".join(f"--{option}={path}" for option, path in files.items())
            self._daemon(name, f"munged --foreground --force {options}")
        self._daemon("h2", "slurmctld -D")
        for name in ("h0", "h1"):
            (folder / f"spool_{name}").mkdir()
            self._daemon(name, f"slurmd -D -N {name}")
        deadline = time.monotonic() + 60
        while not self.is_idle():
            if time.monotonic() > deadline:
                logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
                raise RuntimeError(f"Slurm did not start: {self.ask('sinfo')} {logs}")
            time.sleep(0.5)

    def _daemon(self, name: str, command: str) -> None:
        out = self.folder / f"{command.split()[0]}_{name}.out"
        self._daemons.append(self.hosts.on(name, f"exec {command} > {out} 2>&1", self.environment))

    def ask(self, command: str, environment: dict[str, str] | None = None) -> str:
        """Run a command of Slurm's on the controller's host and return what it says."""
        process = self.hosts.on("h2", command, {**self.environment, **(environment or {})})
        return process.communicate(timeout=60)[0]

    def is_idle(self) -> bool:
        """Whether no node runs anything, the end of a job included."""
        return self.ask("sinfo --noheader --format '%D %t'").strip() == "2 idle"

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.ask(f"scontrol show job {number}").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """End the daemons."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.communicate()
