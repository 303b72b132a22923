"""Real servers on loopback: HTTP with ranges, well or badly behaved, and S3."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves a folder with range requests; the first ``failures`` requests of each range are refused with 503."""

    daemon_threads = True

    def __init__(self, folder: Path, failures: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.failures = folder, failures
        self.silent: set[str] = set()  # paths whose next request is never answered
        self.together = 0  # requests of chunks that are waited for before one of them is answered
        self.most = 0  # that were there at once
        self._here = 0
        self._more = threading.Condition()
        self.closing = threading.Event()
        self.seen: Counter[str] = Counter()

    def gather(self) -> None:
        """Wait until as many requests are here as are wanted at once, or until no more come."""
        with self._more:
            self._here += 1
            self.most = max(self.most, self._here)
            self._more.notify_all()
            self._more.wait_for(lambda: self.most >= self.together, timeout=5)
            self._here -= 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits until the headers have arrived
    server: RangeServer

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        asked = f"{self.path} {self.headers.get('Range', '')}"
        self.server.seen[asked] += 1
        path = self.server.folder / urllib.parse.unquote(self.path).lstrip("/")
        if self.server.together and "/c/" in self.path and self.headers.get("Range"):
            self.server.gather()
        if self.path in self.server.silent:
            self.server.silent.remove(self.path)
            self.server.closing.wait()
            return None
        if self.server.seen[asked] <= self.server.failures:
            return self._send(503, b"", body)
        if not path.is_file():
            return self._send(404, b"", body)
        data = path.read_bytes()
        asked_range = self.headers.get("Range")
        if asked_range is None:
            return self._send(200, data, body)
        start, _, last = asked_range.removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1, len(data)) if last else len(data)
        if int(start) >= len(data):
            return self._send(416, b"", body, f"bytes */{len(data)}")
        return self._send(206, data[int(start) : stop], body, f"bytes {start}-{stop - 1}/{len(data)}")

    def _send(self, status: int, data: bytes, body: bool, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path, failures: int = 0) -> Iterator[RangeServer]:
    server = RangeServer(folder, failures)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def find_moto() -> str | None:
    beside = Path(sys.executable).with_name("moto_server")
    return str(beside) if beside.is_file() else shutil.which("moto_server")


@contextlib.contextmanager
def serve_s3(program: str) -> Iterator[str]:
    """An S3 server with an empty bucket called "atlas"; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        while True:
            try:
                put(f"{url}/atlas", b"")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "the S3 server stopped"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def put(url: str, data: bytes) -> None:
    request = urllib.request.Request(url, data=data, method="PUT")
    # a signature of the right form, which the server does not check: without one it takes the object for a private one
    request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request")
    request.add_header("Content-Type", "application/octet-stream")
    with urllib.request.urlopen(request, timeout=30):
        pass


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())
