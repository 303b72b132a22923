"""Import what bgen trains with, then fork a process for each connection: ``python prefork_server.py SOCKET``.

It ends when its standard input does.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
from pathlib import Path

import torch._dynamo
import torch.distributed.launcher

import bgen.cli.train
import bgen.demo
import bgen.tasks.finetune.finetune
import bgen.train.run

if torch.version.cuda is None and torch.version.hip is None:  # else it would have to choose an accelerator
    os.environ["DS_ACCELERATOR"] = "cpu"
    bgen.train.engine.engine.import_deepspeed()


def serve(path: str) -> list[str]:
    """Fork for each connection. Returns in the forked process alone: with the arguments that it was given."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    watched = selectors.DefaultSelector()
    watched.register(listening, selectors.EVENT_READ)
    watched.register(0, selectors.EVENT_READ)
    ended: dict[int, tuple[socket.socket, int]] = {}  # descriptor of a process to its client and its number
    left: dict[socket.socket, int] = {}  # client to the descriptor of its process
    print("ready", flush=True)
    gc.collect()
    gc.freeze()  # the forked processes share these pages
    while True:
        for key, _ in watched.select():
            if key.fileobj == 0:
                for process in ended:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listening:
                client, _ = listening.accept()
                header, files, _, _ = socket.recv_fds(client, 8, 3)
                asked = json.loads(receive(client, struct.unpack("!Q", header)[0]))
                number = os.fork()
                if number == 0:
                    for other in watched.get_map().values():
                        if other.fileobj != 0:
                            os.close(other.fd)
                    client.close()
                    return begin(asked, files)
                client.sendall(struct.pack("!q", number))
                for descriptor in files:
                    os.close(descriptor)
                process = os.pidfd_open(number)
                ended[process] = client, number
                left[client] = process
                watched.register(process, selectors.EVENT_READ)
                watched.register(client, selectors.EVENT_READ)
            elif isinstance(key.fileobj, socket.socket):  # the client was killed: so is the process that it stands for
                if key.fileobj in left:
                    signal.pidfd_send_signal(left[key.fileobj], signal.SIGKILL)
                    watched.unregister(key.fileobj)
            elif key.fd in ended:
                client, number = ended.pop(key.fd)
                _, status = os.waitpid(number, 0)
                watched.unregister(key.fd)
                os.close(key.fd)
                del left[client]
                if client in {other.fileobj for other in watched.get_map().values()}:
                    watched.unregister(client)
                    client.sendall(struct.pack("!q", status))
                client.close()


def begin(asked: dict, files: list[int]) -> list[str]:
    """Become the process that was asked for; return its arguments."""
    for place, descriptor in enumerate(files):
        os.dup2(descriptor, place)
        os.close(descriptor)
    if os.getsid(0) == asked["session"]:
        os.setpgid(0, asked["group"])
    else:
        os.setsid()
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.executable = os.environ.get("PREFORK_EXECUTABLE", sys.executable)
    sys.path[:1] = [path for path in given if path not in sys.path[1:]]  # in place of the server's folder
    return asked["arguments"]


def receive(client: socket.socket, length: int) -> bytes:
    """Return so many bytes."""
    found = b""
    while len(found) < length:
        found += client.recv(length - len(found))
    return found


def execute(arguments: list[str]) -> None:
    """Do what Python does with these arguments."""
    while arguments[0] in ("-u", "-W", "-X"):
        arguments = arguments[1:] if arguments[0] == "-u" else arguments[2:]
    sys.stdout.reconfigure(line_buffering=True)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def leave(arguments: list[str]) -> None:
    """Execute and end as Python does, but for the second that it takes to tear down what was imported."""
    code: object = 0
    try:
        execute(arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


leave(serve(sys.argv[1]))
