"""A stand-in of the Hub's API over HTTP, for the calls that this project makes: no network is needed."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote


@dataclass
class Repo:
    private: bool = False
    # Branches and commits by name: the files of each.
    trees: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def commit(self, revision: str) -> str:
        """The commit of a branch. It stays when the branch goes on."""
        if len(revision) == 40:
            return revision
        content = json.dumps({name: sha1(x).hexdigest() for name, x in sorted(self.trees[revision].items())})
        commit = sha1(f"{revision}{content}".encode()).hexdigest()
        self.trees[commit] = self.trees[revision]
        return commit


class Hub:
    """Repositories in memory, served at `url`. Private ones are seen with the token alone.

    Attributes:
        seen: Method, path and token of each request.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None: ...

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
                path = unquote(self.path.partition("?")[0])
                hub.seen.append((self.command, path, token))
                status, headers, content = hub.answer(self.command, path, token, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = answer  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if token != self.token:
                return _error(401, "Invalid username or password.")
            if name in self.repos:
                return _error(409, "You already created this model repo", url=f"{self.url}/{name}")
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.repos[name] = Repo(private)
            return _json({"url": f"{self.url}/{name}", "name": name})
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.*))?)?", path)
        repo = None if found is None else self.repos.get(found[1])
        if found is None or repo is None or (repo.private and token != self.token):
            return _error(404, "Repository not found", code="RepoNotFound")
        return self._of_repo(found[1], repo, method, found[2] or "", found[3] or "", body)

    def _of_repo(
        self, name: str, repo: Repo, method: str, what: str, rest: str, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if what == "branch":
            if rest in repo.trees:
                return _error(409, "Reference already exists")
            repo.trees[rest] = dict(repo.trees["main"])
            return _json({})
        if what == "preupload":
            files = json.loads(body)["files"]
            return _json({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        revision, _, file = rest.partition("/")
        tree = repo.trees.get(revision or "main")
        if tree is None:
            return _error(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        if what == "commit":
            return self._commit(name, repo, revision, body)
        commit = repo.commit(revision or "main")
        if what == "resolve":
            if file not in tree:
                return _error(404, "Entry not found", code="EntryNotFound", commit=commit)
            etag = sha1(tree[file]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, tree[file]
        if what == "tree":
            files = [{"type": "file", "path": f, "size": len(x), "oid": sha1(x).hexdigest()} for f, x in tree.items()]
            return _json(files)
        siblings = [{"rfilename": file} for file in tree]
        return _json({"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def _commit(self, name: str, repo: Repo, branch: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        tree = dict(repo.trees[branch])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                tree[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repo.trees[branch] = tree
        commit = repo.commit(branch)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})


def _json(content: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(
    status: int, message: str, code: str = "", commit: str = "", **more: str
) -> tuple[int, dict[str, str], bytes]:
    headers = {"Content-Type": "application/json", "X-Error-Message": message}
    headers |= {"X-Error-Code": code} if code else {}
    headers |= {"X-Repo-Commit": commit} if commit else {}
    return status, headers, json.dumps({"error": message, **more}).encode()
