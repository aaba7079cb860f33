"""A read-only stand-in for the Hub on loopback: repositories of commits of files, as the real clients read them."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubHub:
    """`with StubHub() as hub: hub.commit(...)`, and `HF_ENDPOINT=hub.url` in the environment of the code under test."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        """repository -> commit -> path -> content"""
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Makes `files` the state of the branch; returns the commit."""
        commits = self.commits.setdefault(repository, {})
        sha = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[sha] = files
        self.branches.setdefault(repository, {})[branch] = sha
        return sha

    def __enter__(self) -> "StubHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: two cost 40 ms
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/(?:datasets|models)/([\w-]+/[\w-]+)/refs", path):
            refs = [{"name": name, "ref": name, "targetCommit": sha} for name, sha in self._branches(found[1]).items()]
            self._json({"branches": refs, "tags": [], "converts": []})
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([\w-]+/[\w-]+)(?:/revision/([^/]+))?", path):
            if (sha := self._sha(found[1], found[2] or "main")) is not None:
                self._json({"id": found[1], "sha": sha, "siblings": [], "private": False, "tags": [], "downloads": 0})
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([\w-]+/[\w-]+)/tree/([^/]+)(/.*)?", path):
            if (sha := self._sha(found[1], found[2])) is not None:
                files = self.hub.commits[found[1]][sha] if not found[3] else {}
                if files:
                    self._json([self._entry(name, content) for name, content in files.items()])
                else:
                    self._fail(404, "EntryNotFound")
        elif found := re.fullmatch(r"(?:/datasets)?/([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", path):
            if (sha := self._sha(found[1], found[2])) is not None:
                content = self.hub.commits[found[1]][sha].get(found[3])
                if found[1] in self.hub.gated:
                    self._fail(403, "GatedRepo")
                elif content is None:
                    self._fail(404, "EntryNotFound", {"X-Repo-Commit": sha})
                else:
                    oid = self._entry(found[3], content)["oid"]
                    self._reply(200, content, {"X-Repo-Commit": sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
        else:
            self._fail(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _branches(self, repository: str) -> dict[str, str]:
        return self.hub.branches.get(repository, {})

    def _sha(self, repository: str, revision: str) -> str | None:
        if repository not in self.hub.commits:
            self._fail(401, "RepoNotFound")
        elif revision in self.hub.commits[repository]:
            return revision
        elif revision in self._branches(repository):
            return self._branches(repository)[revision]
        else:
            self._fail(404, "RevisionNotFound")
        return None

    @staticmethod
    def _entry(name: str, content: bytes) -> dict[str, object]:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": name, "oid": oid, "size": len(content)}

    def _json(self, answer: object) -> None:
        self._reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._reply(status, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
