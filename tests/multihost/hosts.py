"""Hosts made of Linux namespaces: each with its own network interface, address, host name, process numbers and sshd.

They share the file system, as the nodes of a cluster do. Needs root. Everything is undone at the end, and nothing of
the machine's own configuration is touched: what a host needs to have elsewhere is mounted over, in its namespace only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd", "pdsh")
SUBNET = "10.213.77"


def missing() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: iproute2, util-linux, openssh-server, openssh-client, pdsh)"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "namespaces are not allowed here"


class Hosts:
    """Context with ``count`` hosts called h0, h1, ... on one switch."""

    def __init__(self, count: int, folder: Path) -> None:
        self.names = [f"h{number}" for number in range(count)]
        self.folder = folder
        self._tag = f"b{os.getpid() % 100_000}"
        self._inits: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for key in ("user_key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        addresses = "".join(f"{SUBNET}.{10 + number} {name}\n" for number, name in enumerate(self.names))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
        (folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {folder}/user_key\n  UserKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking no\n  LogLevel ERROR\n  BatchMode yes\n"
        )
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 50\n"
        )
        try:
            self._ip("link", "add", self._tag, "type", "bridge")
            self._ip("link", "set", self._tag, "up")
            for number, name in enumerate(self.names):
                self._add(number, name)
            for name in self.names:
                self._wait_for_sshd(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._inits:
            process.kill()  # unshare's --kill-child ends the whole host with it
            process.wait()
        for number in range(len(self.names)):
            subprocess.run(["ip", "netns", "del", f"{self._tag}n{number}"], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", f"{self._tag}v{number}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._tag], capture_output=True, check=False)

    def on(self, name: str, command: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a shell command on a host; its output goes to a pipe, standard error to the same."""
        init = self._inits[self.names.index(name)].pid
        child = int(Path(f"/proc/{init}/task/{init}/children").read_text().split()[0])
        return subprocess.Popen(
            ["nsenter", f"--target={child}", "--all", "bash", "-c", command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def cut(self, name: str) -> None:
        """Pull the network cable of a host: nothing is refused or closed, packets just vanish."""
        self._ip("link", "set", f"{self._tag}v{self.names.index(name)}", "down")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        self._ip("link", "set", f"{self._tag}v{self.names.index(name)}", "up")

    def _add(self, number: int, name: str) -> None:
        space, outer, inner = f"{self._tag}n{number}", f"{self._tag}v{number}", f"{self._tag}p{number}"
        self._ip("netns", "add", space)
        self._ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
        self._ip("link", "set", outer, "master", self._tag, "up")
        self._ip("-n", space, "link", "set", "lo", "up")
        self._ip("-n", space, "addr", "add", f"{SUBNET}.{10 + number}/24", "dev", inner)
        self._ip("-n", space, "link", "set", inner, "up")
        boot = (
            f"hostname {name} && mount --make-rprivate / && mount -t proc proc /proc && "
            f"mount --bind {self.folder}/hosts /etc/hosts && "
            f"mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config && "
            f"mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && "
            f"exec {shutil.which('sshd')} -D -E {self.folder}/sshd_{name}.log -f {self.folder}/sshd_config"
        )
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "bash", "-c", boot]
        self._inits.append(subprocess.Popen(["ip", "netns", "exec", space, *unshare], stdin=subprocess.DEVNULL))

    def _wait_for_sshd(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                tried = self.on(self.names[0], f"ssh {name} hostname")
            except IndexError:  # the host is only being made
                time.sleep(0.1)
                continue
            said, _ = tried.communicate(timeout=20)
            if tried.returncode == 0 and said.strip() == name:
                return
            time.sleep(0.2)
        raise RuntimeError(f"no ssh to {name}: {(self.folder / f'sshd_{name}.log').read_text()[-2000:]}")

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)
