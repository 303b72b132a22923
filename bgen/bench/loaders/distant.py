"""A server of files that answers late, in a process of its own: ``python -m bgen.bench.loaders.distant FOLDER``.

``/50/store/manifest.json`` is the file ``store/manifest.json`` of the folder, 50 ms after it was asked for; ranges are
understood. ``/most`` tells how many requests were waiting at once since that was last asked. The first line that is
written is the port.
"""

from __future__ import annotations

import asyncio
import os
import sys
import urllib.parse
from pathlib import Path

REASONS = {200: "OK", 206: "Partial Content", 404: "Not Found", 416: "Range Not Satisfiable"}


class Distant:
    """Serves a folder.

    Parameters
    ----------
    folder
        The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._waiting = self._most = 0

    async def serve(self) -> None:
        """Serve on a free port of this machine alone, without end."""
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        async with server:
            await server.serve_forever()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                status, data, more = await self._answer(path, fields.get("range", ""))
                lines = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Length: {len(data)}\r\n{more}\r\n"
                writer.write(lines.encode("latin-1") + (data if method == "GET" else b""))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, asked: str) -> tuple[int, bytes, str]:
        """Return status, body and further lines of the head."""
        if path == "/most":
            most, self._most = self._most, 0
            return 200, str(most).encode(), ""
        late, _, name = path.lstrip("/").partition("/")
        self._waiting += 1
        self._most = max(self._most, self._waiting)
        await asyncio.sleep(float(late) / 1000)
        self._waiting -= 1
        file = (self._folder / urllib.parse.unquote(name)).resolve()
        if not file.is_relative_to(self._folder) or not file.is_file():
            return 404, b"", ""
        size = file.stat().st_size
        if not asked:
            return 200, file.read_bytes(), ""
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if start >= size:
            return 416, b"", f"Content-Range: bytes */{size}\r\n"
        with file.open("rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), stop - start, start)
        return 206, data, f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n"


if __name__ == "__main__":
    asyncio.run(Distant(Path(sys.argv[1])).serve())
