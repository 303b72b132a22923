"""A hub of models on loopback that speaks the part of Hugging Face's protocol that pushing and fetching need.

Repositories, commits and files are kept in memory. Files of more than ``LARGE`` bytes go the way of large files (LFS).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = 20_000


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; ``repos``: name to its commits, each with its files; ``objects``: large files by checksum."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.down = False
        self.changed_on_the_way: set[str] = set()
        self.token: str | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, path))
        if self.server.down:
            return self.answer(503)
        if self.server.token is not None and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, {"error": "log in"}, X_Error_Code="RepoNotFound")
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                return method(self, body, **found.groupdict())
        return self.answer(404, {"error": "no such path"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body: bytes) -> None:
        told = json.loads(body)
        name = f"{told.get('organization') or 'me'}/{told['name']}"
        if name in self.server.repos:
            return self.answer(409, {"url": f"{self.server.address}/{name}"})
        self.server.repos[name] = {
            "private": told.get("visibility") == "private" or told.get("private", False),
            "commits": [(git_sha(name.encode()), {})],
        }
        return self.answer(200, {"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def validate(self, body: bytes) -> None:
        head = json.loads(body)["content"].split("---")[1]
        try:
            good = isinstance(yaml.safe_load(head), dict)
        except yaml.YAMLError:
            good = False
        return self.answer(200 if good else 400, {"errors": [] if good else [{"message": "no YAML"}], "warnings": []})

    def commit_of(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.server.repos:
            self.answer(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
            return None
        commits = self.server.repos[repo]["commits"]
        known = {"main": commits[-1], **{commit: (commit, files) for commit, files in commits}}
        if revision not in known:
            self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            return None
        return known[revision]  # type: ignore[no-any-return]

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] > LARGE else "regular", "shouldIgnore": False}
            for f in files
        ]
        return self.answer(200, {"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        asked = json.loads(body)["objects"]
        objects = []
        for one in asked:
            upload = {"upload": {"href": f"{self.server.address}/objects/{one['oid']}", "header": {}}}
            objects.append({**one, "authenticated": True, "actions": upload})
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400)
        self.server.objects[oid] = body
        return self.answer(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self.commit_of(repo, revision)
        if found is None:
            return
        files = dict(found[1])
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif told["key"] == "deletedFile":
                del files[value["path"]]
        number = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()
        self.server.repos[repo]["commits"].append((number, files))
        return self.answer(200, {"commitUrl": f"{self.server.address}/{repo}/commit/{number}", "commitOid": number})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self.commit_of(repo, revision)
        if found is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self.answer(200, {"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "private": False})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        found = self.commit_of(repo, revision)
        if found is not None:
            self.answer(200, [self.entry(path, content) for path, content in found[1].items()])

    def paths(self, body: bytes, repo: str, revision: str) -> None:
        found = self.commit_of(repo, revision)
        if found is not None:
            asked = json.loads(body)["paths"]
            self.answer(200, [self.entry(path, found[1][path]) for path in asked if path in found[1]])

    @staticmethod
    def entry(path: str, content: bytes) -> dict[str, Any]:
        told: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha(content)}
        if len(content) > LARGE:
            told["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return told

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        found = self.commit_of(repo, revision)
        if found is None:
            return
        if file not in found[1]:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        content = found[1][file]
        etag = hashlib.sha256(content).hexdigest() if len(content) > LARGE else git_sha(content)
        if file in self.server.changed_on_the_way:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=found[0])


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (rf"/api/models/{_REPO}/preupload/{_REVISION}", Handler.preupload),
    (rf"/api/models/{_REPO}/commit/{_REVISION}", Handler.commit),
    (rf"/api/models/{_REPO}/revision/{_REVISION}", Handler.info),
    (rf"/api/models/{_REPO}/tree/{_REVISION}/?", Handler.tree),
    (rf"/api/models/{_REPO}/paths-info/{_REVISION}", Handler.paths),
    (rf"/api/models/{_REPO}", Handler.info),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/objects/(?P<oid>[0-9a-f]{64})", Handler.put),
    (rf"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """Give a hub that answers until the end."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
