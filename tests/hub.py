"""A stand-in for the Hugging Face Hub on loopback: repositories in memory, spoken to by huggingface_hub and datasets themselves.

It answers what huggingface_hub 0.36 asks when it makes a repository, uploads a folder (git blobs and LFS objects), downloads files and lists a data set.
Source: huggingface_hub's hf_api.py, _commit_api.py, lfs.py, file_download.py and hf_file_system.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_a_test"  # noqa: S105, nobody's


@dataclass
class Hub:
    """Repositories by name: files by path. ``private`` are those made so, ``commits`` counts them, ``objects`` are uploaded LFS contents.

    Repositories of data sets are named "datasets/OWNER/NAME". ``fault`` is the status that every question gets in place of its answer, or "cut": the
    connection ends in the middle of each file.
    """

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: dict[str, int] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    lfs_paths: set[str] = field(default_factory=set)
    fault: int | Literal["cut"] | None = None

    def sha(self, repo: str) -> str:
        """The commit that a repository is at: 40 hex digits."""
        return hashlib.sha1(f"{repo} {self.commits.get(repo, 0)}".encode(), usedforsecurity=False).hexdigest()

    def env(self, home: object) -> dict[str, str]:
        """What a process needs to take this for the Hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that listens on a port of its own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, the base class calls it so
        pass

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._read()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/api/validate-yaml"):
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'alice'}/{asked['name']}"
            there = name in self.hub.repos
            if not there:
                self.hub.repos[name] = {}
                if asked.get("private"):
                    self.hub.private.add(name)
            self._answer(409 if there else 200, {"url": f"{self.hub.endpoint}/{name}", "error": "You already created this model repo"})
        elif path == "/api/validate-yaml":
            front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
            fine = bool(front and isinstance(yaml.safe_load(front[1]), dict))
            self._answer(200 if fine else 400, {"errors": [] if fine else [{"message": "no front matter"}], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = json.loads(body)["files"]
            mode = {f["path"]: "lfs" if f["path"].endswith((".onnx", ".onnx_data")) else "regular" for f in files}
            self._answer(
                200 if found[1] in self.hub.repos else 404,
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]},
            )
        elif re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            sent = [one | {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}} for one in wanted]
            self._answer(200, {"transfer": "basic", "objects": sent}, {"Content-Type": "application/vnd.git-lfs+json"})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404)

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.repos[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                self.hub.lfs_paths.add(value["path"])
        self.hub.commits[repo] = self.hub.commits.get(repo, 0) + 1
        sha = self.hub.sha(repo)
        self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def do_PUT(self) -> None:
        oid, content = urlsplit(self.path).path.rpartition("/")[2], self._read()
        if hashlib.sha256(content).hexdigest() != oid:
            self._answer(400, {"error": "sha256 differs"})
            return
        self.hub.objects[oid] = content
        self._answer(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if isinstance(self.hub.fault, int) and path != "/":
            self._answer(self.hub.fault, {"error": "of a test"})
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[3])
        elif found := re.fullmatch(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+?)(/revision/[^/]+)?", path):
            self._facts(found[1])
        elif found := re.fullmatch(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            below = f"{found[2]}/" if found[2] else ""
            listed = self._entries(found[1], below, deep=deep)
            if listed:
                self._answer(200, listed)
            else:
                self._refuse(404, "EntryNotFound", "not here")
        else:
            self._refuse(404, "EntryNotFound", "not here")

    def _facts(self, repo: str) -> None:
        if repo not in self.hub.repos:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        name = repo.removeprefix("datasets/")
        siblings = [{"rfilename": file} for file in sorted(self.hub.repos[repo])]
        facts = {"id": name, "sha": self.hub.sha(repo), "private": False, "tags": [], "downloads": 0, "siblings": siblings}
        self._answer(200, facts if name != repo else facts | {"modelId": name})

    def _entries(self, repo: str, below: str = "", *, deep: bool) -> list[dict[str, Any]]:
        """Files, and folders where not ``deep``, below a folder ("" or "x/")."""
        entries: dict[str, dict[str, Any]] = {}
        for name, content in sorted(self.hub.repos.get(repo, {}).items()):
            inside = name.removeprefix(below)
            if not name.startswith(below):
                continue
            digest = hashlib.sha256(content).hexdigest()[:40]
            folder = below + inside.partition("/")[0]
            if "/" in inside:
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": digest}
            if deep or "/" not in inside:
                entries[name] = {"type": "file", "path": name, "size": len(content), "oid": digest}
        return list(entries.values())

    def _file(self, repo: str, name: str) -> None:
        content = self.hub.repos.get(repo, {}).get(name)
        if content is None:
            self._refuse(404, "EntryNotFound" if repo in self.hub.repos else "RepoNotFound", f"{name} is not in {repo}")
            return
        digest = hashlib.sha256(content).hexdigest()
        if self.hub.fault == "cut" and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self._answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": self.hub.sha(repo), "Content-Type": "application/octet-stream"})
