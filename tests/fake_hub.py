"""A Hugging Face Hub of one process: the calls that huggingface_hub makes to read and write a model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@dataclass
class Hub:
    """Repositories by name, revisions of them by name (commits, branches and tags alike), files by name."""

    address: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """The paths of all requests."""
    broken: int = 0
    """The status that everything is answered with, if not 0."""

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        """Have a revision of a repository, under its name and under its commit."""
        revisions = self.repos.setdefault(repo, {})
        revisions[revision] = revisions[commit_of(files)] = files


def commit_of(files: dict[str, bytes]) -> str:
    """A commit's hash follows from what is in it."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Server(ThreadingHTTPServer):
    """A client that hangs up without reading an answer to its end is no error."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Answers(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def _say(self, status: int, body: bytes | Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _parts(self) -> list[str]:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(path)
        return path.strip("/").split("/")

    def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; None after the hub's own answer that there are none."""
        revisions = self.hub.repos.get(repo)
        if revisions is None:
            self._say(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif revision not in revisions:
            self._say(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return (revisions or {}).get(revision)

    def do_GET(self) -> None:
        """Facts about a repository, the list of its files, and a file."""
        parts = self._parts()
        if self.hub.broken:
            return self._say(self.hub.broken, {"error": "broken"})
        if parts[:2] == ["api", "models"]:
            what = parts[4] if len(parts) > 4 else "revision"
            files = self._files("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            if files is None:
                return None
            if what == "tree":
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self._say(200, listed)
            names = [{"rfilename": name} for name in files]
            return self._say(200, {"id": "/".join(parts[2:4]), "sha": commit_of(files), "siblings": names, "tags": []})
        if len(parts) < 5:
            return self._say(404, {"error": "this hub has repositories and their files alone"})
        files = self._files("/".join(parts[:2]), parts[3])
        if files is None:
            return None
        name = "/".join(parts[4:])
        if name not in files:
            return self._say(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        tag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return self._say(200, files[name], ETag=tag, X_Repo_Commit=commit_of(files))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """A new repository, and a commit."""
        parts = self._parts()
        body = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "Content-Length" in self.headers else b""
        )
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.hub.broken:
            return self._say(self.hub.broken, {"error": "broken"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            said = json.loads(body)
            name = f"{said.get('organization') or 'user'}/{said['name']}"
            if name.startswith("other/"):
                return self._say(403, {"error": "You don't have the rights to create a model under this namespace"})
            if name not in self.hub.repos:
                self.hub.put(name, {})
            return self._say(200, {"url": f"{self.hub.address}/{name}", "name": name})
        if parts == ["api", "validate-yaml"]:
            return self._say(200, {"errors": [], "warnings": []})
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            wanted = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]
            return self._say(200, {"files": modes})
        files = dict(self.hub.repos[repo]["main"])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.hub.put(repo, files)
        sha = commit_of(files)
        return self._say(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{sha}", "commitOid": sha})


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers inside the block."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
