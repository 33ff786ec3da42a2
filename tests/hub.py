"""A small Hugging Face Hub on this machine, for the real `huggingface_hub` to talk to."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

Files = dict[str, bytes]


def read_files(directory: Path, prefix: str = "") -> Files:
    """A directory as the hub holds it: content by path."""
    return {
        prefix + str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@dataclass
class Hub:
    """Repositories by name, each a table of branches, each a table of files.

    Attributes:
        downloads: The files that were fetched, as `name/branch/path`.
        created: What `create_repo` sent.
        commits: Repository, branch and header of each commit.
        tokens: The tokens that came with any request.
        requests: The path of each request about a model.
        silent: Whether requests get no answer.
        busy: How many requests to answer with 503 before any other answer.
    """

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    silent: bool = False
    busy: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    objects: Files = field(default_factory=dict)
    url: str = ""

    def add(self, name: str, directory: Path, *, prefix: str = "", branch: str = "main") -> str:
        """Put a directory into a repository; gives its name."""
        files = self.repositories.setdefault(name, {}).setdefault(branch, {})
        files.update(read_files(directory, prefix))
        return name

    def revision(self, name: str, revision: str) -> tuple[str, Files] | None:
        """The commit and the files of a branch, or of a commit."""
        for branch, files in self.repositories.get(name, {}).items():
            content = json.dumps([[p, hashlib.sha1(b).hexdigest()] for p, b in files.items()])
            commit = hashlib.sha1(f"{name} {branch} {content}".encode()).hexdigest()
            if revision in (branch, commit):
                return commit, files
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, code: str) -> None:
        self._send(404, b"{}", X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _found(self, name: str, revision: str) -> tuple[str, Files] | None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        if name not in self.hub.repositories:
            self._error("RepoNotFound")
            return None
        found = self.hub.revision(name, unquote(revision))
        if found is None:
            self._error("RevisionNotFound")
        return found

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path or path.startswith("/api/models/"):
            self.hub.requests.append(path)
        if self.hub.silent:
            self.hub.closing.wait()
            self.close_connection = True
        elif self.hub.busy:
            self.hub.busy -= 1
            self._send(503)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if found := self._found(match[1], match[2] or "main"):
                siblings = [{"rfilename": name} for name in found[1]]
                self._json({"id": match[1], "sha": found[0], "siblings": siblings, "tags": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if found := self._found(match[1], match[2]):
                self._json([_entry(name, content) for name, content in found[1].items()])
        else:
            self._send(404)

    do_HEAD = do_GET  # noqa: N815

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        if self.command == "GET":
            self.hub.downloads.append(f"{name}/{revision}/{path}")
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        self._send(200, files[path], X_Repo_Commit=commit, ETag=etag)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.hub.created.append(wanted)
            status = 409 if name in self.hub.repositories else 200
            self.hub.repositories.setdefault(name, {"main": {}})
            self._json({"url": f"{self.hub.url}/{name}", "id": name, "name": name}, status)
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".rbln") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(match[1], match[2], body, "create_pr=1" in self.path)
        else:
            self._send(404)

    def do_PUT(self) -> None:
        content = self._body()
        oid = hashlib.sha256(content).hexdigest()
        if self.path != f"/objects/{oid}":
            self._send(400)
            return
        self.hub.objects[oid] = content
        self._send(200)

    def _commit(self, name: str, branch: str, body: bytes, pull_request: bool) -> None:
        found = self._found(name, branch)
        if found is None:
            return
        target = "refs/pr/1" if pull_request else branch
        files = dict(found[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append((name, target, value))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        self.hub.repositories[name][target] = files
        commit = "0" * 40
        url = f"{self.hub.url}/{name}"
        answer = {"commitUrl": f"{url}/commit/{commit}", "commitOid": commit, "success": True}
        if pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/1"
        self._json(answer)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


@contextlib.contextmanager
def serve_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that `huggingface_hub` takes for the real one, with an empty cache."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            server.shutdown()
            thread.join()


def fill_cache(cache: Path, name: str, files: Files) -> None:
    """Lay files out as `huggingface_hub` keeps what it has downloaded."""
    commit = hashlib.sha1(name.encode()).hexdigest()
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs").mkdir()
    for path, content in files.items():
        blob = folder / "blobs" / hashlib.sha1(content).hexdigest()
        blob.write_bytes(content)
        link = folder / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
