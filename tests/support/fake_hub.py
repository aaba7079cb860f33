"""Serves a Hub on loopback, in memory, for the real clients: repositories whose branches can be written and read.

    with FakeHub() as hub:
        hub.fault("POST", "/commit/", status=503, times=2)
        publish(..., api=HfApi(endpoint=hub.url, token="hf_alice"))

It answers as the source of huggingface_hub and datasets expects. These points are guesses, not verified against the
real Hub:
- a commit whose parent is not the branch's head is refused with 412 and has no effect;
- titles of commits come back unchanged, whatever their length;
- a new repository has one commit, with .gitattributes, which is the last in the list of commits;
- an unknown token gets 401; another owner's repository, name or gated files get 403; another owner's private repository
  gets 404;
- the licence, the languages and the configs of a card's front matter are validated, the rest is accepted;
- every branch name is accepted;
- only .parquet files are LFS, and uploads without Xet are whole ("basic"); the real Hub also has uploads in parts;
- Xet stores in a folder (`local_xet.py`); the real one is a service with its own faults;
- the rules of .gitignore are patterns of `fnmatch`;
- the answer to a fault is text, not JSON, as from a proxy;
- requests are not limited; the real Hub allows about 128 commits an hour and answers more with 429.
Models and datasets share one namespace. Every user is in the organisation "lab", which has no repositories. Pull
requests and tags are missing.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from support.local_xet import LocalXet


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    files: dict[str, bytes]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    """What the Hub says of the repository today; of no commit."""

    def history(self, revision: str) -> list[Commit]:
        """Returns the commits from a branch's head or a commit back to the first one."""
        at: str | None = self.branches.get(revision, revision)
        if at not in self.commits:
            raise RefusedError(404, "RevisionNotFound")
        found = []
        while at is not None:
            found.append(self.commits[at])
            at = found[-1].parent
        return found

    def files(self, revision: str) -> dict[str, bytes]:
        return self.history(revision)[0].files

    def add(self, branch: str, title: str, files: Mapping[str, bytes]) -> Commit:
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, self.branches.get(branch), title, dict(files))
        self.branches[branch] = oid
        return self.commits[oid]


@dataclass
class Fault:
    """A fault of the next matching requests.

    `how` is "reply" (answers with the status), "drop" (hangs up without an answer), "lose" (does the work, then hangs
    up) or "hold" (waits until `FakeHub.held` is cleared, then hangs up).
    """

    method: str
    path: str
    how: str
    status: int
    times: int
    headers: dict[str, str]
    content: bytes

    def matches(self, method: str, path: str) -> bool:
        return method == self.method and self.path in path


class RefusedError(Exception):
    def __init__(
        self, status: int, code: str | None = None, text: str = "", headers: dict[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(text or code or f"status {status}")
        self.status, self.headers = status, headers or {}
        self.body = {"error": str(self), **more}
        if code is not None:
            self.headers["X-Error-Code"] = code


class FakeHub:
    def __init__(self, xet: LocalXet | None = None) -> None:
        self.xet = xet
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        """The user of each token. The owner of a repository is the first part of its id."""
        self.roles: dict[str, str] = {}
        """The roles of tokens whose role is not "write"."""
        self.repositories: dict[str, Repository] = {}
        self.log: list[tuple[str, str, int | str]] = []
        """The method, the path, and the status or kind of fault of each request."""
        self.received: list[bytes] = []
        """The bodies of the requests."""
        self.page_size = 1000
        self.lock = threading.Lock()
        self.held = threading.Event()
        """Set while a request waits."""
        self.uploads: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def create(self, repo_id: str, *, private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.add("main", "initial commit", {".gitattributes": b"*.parquet filter=lfs\n"})
        return repository

    def commit(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Replaces the files of a branch, in a repository that is created if missing; returns the commit."""
        repository = self.repositories.get(repo_id) or self.create(repo_id)
        return repository.add(branch, "by a test", files).id

    def fault(
        self,
        method: str,
        path: str,
        how: str = "reply",
        *,
        status: int = 503,
        times: int = 1,
        content: bytes = b"a fault of the test",
        **headers: str,
    ) -> None:
        """Makes the next `times` requests fail whose path contains `path`, by default with a reply of `content`.

        Pass headers as Retry_After="7".
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._faults.append(Fault(method, path, how, status, times, named, content))

    def count(self, method: str, path: str) -> int:
        """Returns the number of requests so far whose path contains `path`."""
        return sum(seen == method and path in where for seen, where, _ in self.log)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            fault = next((each for each in self._faults if each.times and each.matches(method, path)), None)
            if fault is not None:
                fault.times -= 1
            return fault

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()


Answer = tuple[Any, dict[str, str]]
"""The body of an answer, as bytes or as an object for JSON, and its headers."""

_API = r"/api/(?:datasets|models)/([^/]+/[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent separately

    def do_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        fault = self.hub.take_fault(self.command, url.path)
        how = fault.how if fault else None
        if how not in ("drop", "hold"):
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.hub.received.append(self.body)
            status, (content, headers) = self._answer(url.path, fault if how == "reply" else None)
        self.hub.log.append((self.command, url.path, how if how in ("drop", "lose", "hold") else status))
        if how == "hold":
            self.hub.held.set()
            while self.hub.held.is_set():
                time.sleep(0.01)
        if how in ("drop", "lose", "hold"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_any  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, path: str, fault: Fault | None) -> tuple[int, Answer]:
        if fault is not None:
            return fault.status, (fault.content, {"Content-Type": "text/plain", **fault.headers})
        try:
            for method, pattern, action in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                    with self.hub.lock:
                        answer = action(self, *(unquote(part or "") for part in match.groups()))
                    return 206 if "Content-Range" in answer[1] else 200, answer
            raise RefusedError(404, text=f"no such route: {path}")
        except RefusedError as error:
            return error.status, (error.body, error.headers)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _user(self, *, needed: bool = False) -> str | None:
        token = self.token
        if (token and token not in self.hub.tokens) or (needed and not token):
            raise RefusedError(401, text="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repository(self, repo_id: str, *, write: bool = False, files: bool = False) -> Repository:
        user, repository = self._user(needed=write), self.hub.repositories.get(repo_id)
        owned = user == repo_id.split("/")[0]
        if repository is None or (repository.private and not owned):
            raise RefusedError(404 if user else 401, "RepoNotFound")
        if write and not owned:
            raise RefusedError(403, text="You do not have the rights to write here")
        if files and repository.gated and not owned:
            raise RefusedError(403 if user else 401, "GatedRepo")
        return repository

    def whoami(self) -> Answer:
        role = self.hub.roles.get(self.token, "write")
        user, orgs = self._user(needed=True), [{"name": "lab"}]
        return {"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": {"role": role}}}, {}

    def validate_yaml(self) -> Answer:
        text = json.loads(self.body)["content"]
        card = yaml.safe_load(text.partition("---\n")[2].partition("---\n")[0]) or {}
        wrong = [
            *({"license": "unknown"} if card.get("license") not in (None, "other", "mit", "apache-2.0") else {}),
            *(code for code in card.get("language", []) if not re.fullmatch(r"[a-z]{2,3}", str(code))),
            *(each for each in card.get("configs", []) if not {"config_name", "data_files"} <= each.keys()),
        ]
        if wrong:
            raise RefusedError(400, errors=[{"message": f"not valid: {wrong}"}], warnings=[])
        return {"errors": [], "warnings": []}, {}

    def create(self) -> Answer:
        user, request = self._user(needed=True), json.loads(self.body)
        repo_id = f"{request['organization'] or user}/{request['name']}"
        if repo_id.split("/")[0] != user:
            raise RefusedError(403, text="You do not have the rights to create a repository under this name")
        if repo_id in self.hub.repositories:
            raise RefusedError(
                409, text="You already created this repository", url=f"{self.hub.url}/datasets/{repo_id}"
            )
        self.hub.create(repo_id, private=request.get("visibility") == "private")
        return {"url": f"{self.hub.url}/datasets/{repo_id}"}, {}

    def info(self, repo_id: str, revision: str) -> Answer:
        repository = self._repository(repo_id)
        head = repository.history(revision or "main")[0]
        siblings = [{"rfilename": name} for name in head.files]
        facts = {"id": repo_id, "sha": head.id, "private": repository.private, "siblings": siblings}
        card = head.files.get("README.md", b"").decode(errors="replace").partition("---\n")[2].partition("---\n")[0]
        facts["tags"] = repository.tags
        return facts | {"downloads": 0, "cardData": yaml.safe_load(card)}, {}

    def refs(self, repo_id: str) -> Answer:
        branches = self._repository(repo_id).branches.items()
        refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in branches]
        return {"branches": refs, "tags": [], "converts": []}, {}

    def branch(self, repo_id: str, name: str) -> Answer:
        repository = self._repository(repo_id, write=True)
        if name in repository.branches:
            raise RefusedError(409, text="Reference already exists")
        repository.branches[name] = repository.history(json.loads(self.body).get("startingPoint", "main"))[0].id
        return {}, {}

    def commits(self, repo_id: str, revision: str) -> Answer:
        common = {"message": "", "authors": []}
        history = self._repository(repo_id).history(revision)
        return [common | {"id": each.id, "title": each.title, "date": each.date} for each in history], {}

    def tree(self, repo_id: str, revision: str, folder: str) -> Answer:
        """Lists the files below a folder, with or without its subfolders. Folders themselves are not listed."""
        recursive = self.query["recursive"][0].lower() == "true"
        found = []
        for name, content in self._repository(repo_id, files=True).files(revision).items():
            inner = name.removeprefix(f"{folder}/")
            if (not folder or inner != name) and (recursive or "/" not in inner):
                found.append({"type": "file", "path": name, "oid": _etag(name, content), "size": len(content)})
        if folder and not found:
            raise RefusedError(404, "EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        if end >= len(found):
            return found[start:], {}
        following = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={end}"
        return found[start:end], {"Link": f'<{following}>; rel="next"'}

    def preupload(self, repo_id: str, revision: str) -> Answer:
        files, answers = self._repository(repo_id, write=True).files(revision), []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(".parquet") else "regular"
            oid = _etag(name, files[name]) if name in files else None
            ignored = any(fnmatch(name, rule) for rule in files.get(".gitignore", b"").decode().split())
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return {"files": answers}, {}

    def lfs_batch(self, repo_id: str) -> Answer:
        self._repository(repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.uploads:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
        return {"transfer": "basic", "objects": objects}, {}

    def lfs_upload(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, text="the content does not match its sha256")
        self.hub.uploads[oid] = self.body
        return b"", {}

    def xet_token(self, repo_id: str, kind: str, revision: str) -> Answer:
        self._repository(repo_id, write=kind == "write", files=True)
        if self.hub.xet is None:
            raise RefusedError(404, text="no Xet here")
        expires = str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": self.hub.xet.url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires}
        return {"casUrl": self.hub.xet.url, "accessToken": "xet", "exp": int(expires)}, headers

    def commit(self, repo_id: str, branch: str) -> Answer:
        repository = self._repository(repo_id, write=True)
        head, files = repository.history(branch)[0], dict(repository.files(branch))
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["value"].get("parentCommit", head.id) != head.id:
            raise RefusedError(412, text="A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and (content := self._uploaded(value["oid"], value["size"])) is not None:
                files[value["path"]] = content
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise RefusedError(400, text=f"cannot be committed: {key} {value['path']}")
        new = repository.add(branch, lines[0]["value"]["summary"], files)
        return {"commitOid": new.id, "commitUrl": f"{self.hub.url}/datasets/{repo_id}/commit/{new.id}"}, {}

    def _uploaded(self, oid: str, size: int) -> bytes | None:
        if oid not in self.hub.uploads and self.hub.xet is not None and oid in self.hub.xet.hashes():
            self.hub.uploads[oid] = self.hub.xet.content(oid, size)
        return self.hub.uploads.get(oid)

    def download(self, repo_id: str, revision: str, name: str) -> Answer:
        head = self._repository(repo_id, files=True).history(revision)[0]
        if name not in head.files:
            raise RefusedError(404, "EntryNotFound", headers={"X-Repo-Commit": head.id})
        content = head.files[name]
        headers = {"X-Repo-Commit": head.id, "ETag": f'"{_etag(name, content)}"', "Accept-Ranges": "bytes"}
        if self.hub.xet is not None and (stored := self.hub.xet.hashes().get(_etag(name, content))):
            kind = "datasets" if self.path.startswith("/datasets/") else "models"
            refresh = f"{self.hub.url}/api/{kind}/{repo_id}/xet-read-token/{head.id}"
            headers |= {
                "X-Xet-Hash": stored,
                "Link": f'<{refresh}>; rel="xet-auth"',
                "X-Linked-Size": str(len(content)),
            }
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        return content, headers


def _etag(name: str, content: bytes) -> str:
    if name.endswith(".parquet"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _API + "(?:/revision/([^/]+))?", _Handler.info),
    ("POST", _API + "/branch/([^/]+)", _Handler.branch),
    ("GET", _API + "/refs", _Handler.refs),
    ("GET", _API + "/commits/([^/]+)", _Handler.commits),
    ("GET", _API + "/xet-(read|write)-token/(.+)", _Handler.xet_token),
    ("GET", _API + "/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("POST", _API + "/preupload/([^/]+)", _Handler.preupload),
    ("POST", "(?:/datasets)?/([^/]+/[^/]+)[.]git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", _API + "/commit/([^/]+)", _Handler.commit),
    ("GET", "(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.download),
]
