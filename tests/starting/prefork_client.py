"""Stand for a process that the server forks: ``python -IS prefork_client.py SOCKET [arguments of Python]``.

It hands over its arguments, environment, folder and files, passes signals on, and ends as that process ends. When it is
killed, the server kills that process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def main() -> None:
    """Ask for the process and wait for it."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(sys.argv[1])
    asked = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
    asked |= {"group": os.getpgid(0), "session": os.getsid(0)}
    request = json.dumps(asked).encode()
    socket.send_fds(server, [struct.pack("!Q", len(request))], [0, 1, 2])
    server.sendall(request)
    (pid,) = struct.unpack("!q", receive(server, 8))
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    for descriptor in (0, 1, 2):  # whoever reads what that process writes waits for it alone
        os.close(descriptor)
    (status,) = struct.unpack("!q", receive(server, 8))
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def receive(server: socket.socket, length: int) -> bytes:
    """Return so many bytes."""
    found = b""
    while len(found) < length:
        part = server.recv(length - len(found))
        if not part:
            os._exit(70)  # the server is gone
        found += part
    return found


main()
