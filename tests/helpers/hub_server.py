"""A small Hugging Face Hub on loopback, in memory, for the real client: what uploading, listing and downloading call.

Covered: whoami, creating a repository, validating a card, preupload, the LFS batch call with single-part and multi-part
uploads and their completion, commits (files added, regular or LFS; deleted files), model info, tree listing, HEAD and
GET of files (LFS ones through a redirect with X-Linked headers, as the Hub's storage does), byte ranges, tokens.

Not covered: Xet storage (the client must run with HF_HUB_DISABLE_XET=1), pull requests, branches other than main,
copies, moving and deleting repositories, data sets, running a Space, search, gated repositories, rate limits.
Spaces are repositories of their own, under 'spaces/ORG/NAME'.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_good"
LFS_FROM = 10_000  # bytes; larger files are LFS files
PART = 400_000  # bytes; larger LFS files come in parts


@dataclass
class Repository:
    """Files by path, and the identifier of the last commit."""

    files: dict[str, bytes] = field(default_factory=dict)
    lfs: dict[str, str] = field(default_factory=dict)  # path to SHA-256
    commit: str = "0" * 40
    private: bool = False
    sdk: str | None = None  # of a Space


@dataclass
class Hub:
    """What is stored, and every request, as 'METHOD path'."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail_commits: bool = False


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Routes of the Hub's API, by method and pattern."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    REPO = r"(?P<repo>(?:spaces/)?[^/]+/[^/]+)"
    API = r"/api/(?:models/)?" + REPO
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", API + r"/preupload/main", "preupload"),
        ("POST", API + r"/commit/main", "commit"),
        ("GET", API + r"/tree/[^/]+(?:/.*)?", "tree"),
        ("GET", API + r"(?:/revision/[^/]+)?", "info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<oid>\w+)(?:/(?P<part>\d+))?", "put"),
        ("POST", r"/storage/(?P<oid>\w+)", "complete"),
        ("HEAD|GET", r"/storage/(?P<oid>\w+)", "get_object"),
        ("HEAD|GET", rf"/{REPO}/resolve/[^/]+/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_: Any) -> None: ...

    def route(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.read_body()
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                return getattr(self, name)(**match.groupdict())
        return self.answer(404, {"error": f"not served: {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = route  # noqa: N815

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid username or password."})
        return False

    def repository(self, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        if found is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def whoami(self) -> None:
        if self.authorised():
            self.answer(200, {"name": "tester", "type": "user", "orgs": []})

    def create(self) -> None:
        if not self.authorised():
            return
        wanted = json.loads(self.body)
        is_space = wanted.get("type") == "space"
        repo = f"{'spaces/' if is_space else ''}{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if is_space and wanted.get("sdk") not in ("gradio", "docker", "static"):
            return self.answer(400, {"error": "a Space needs an sdk"})
        known = repo in self.hub.repositories
        is_private = wanted.get("private") or wanted.get("visibility") == "private"  # older clients, newer ones
        created = Repository(private=bool(is_private), sdk=wanted.get("sdk"))
        self.hub.repositories.setdefault(repo, created)
        return self.answer(409 if known else 200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def validate(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str) -> None:
        if not self.authorised() or self.repository(repo) is None:
            return
        files = [
            dict(path=f["path"], shouldIgnore=False, uploadMode="lfs" if f["size"] > LFS_FROM else "regular")
            for f in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, repo: str) -> None:
        if not self.authorised() or self.repository(repo) is None:
            return
        self.answer(200, {"transfer": "basic", "objects": [self.upload(o) for o in json.loads(self.body)["objects"]]})

    def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where an object goes: nowhere if it is here, to one address, or to one for each part."""
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.hub.objects:
            return wanted
        address = f"{self.hub.url}/storage/{oid}"
        header: dict[str, str] = {}
        if size > PART:
            count = -(-size // PART)
            header = {"chunk_size": str(PART), **{f"{i:05d}": f"{address}/{i}" for i in range(1, count + 1)}}
        return wanted | {"actions": {"upload": {"href": address, "header": header}}}

    def put(self, oid: str, part: str | None) -> None:
        if part is None:
            return self.store(oid, self.body)
        self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        return self.answer(200, ETag=f'"{part}"')

    def complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        self.store(oid, b"".join(parts[p["partNumber"]] for p in json.loads(self.body)["parts"]))

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "wrong checksum"})
        self.hub.objects[oid] = content
        return self.answer(200, {})

    def commit(self, repo: str) -> None:
        found = self.repository(repo)
        if found is None or not self.authorised():
            return
        if self.hub.fail_commits:
            return self.answer(400, {"error": "commits are switched off"})
        for line in self.body.splitlines():
            operation = json.loads(line)
            self.apply(found, operation["key"], operation["value"])
        found.commit = hashlib.sha1(self.body).hexdigest()
        address = f"{self.hub.url}/{repo}/commit/{found.commit}"
        return self.answer(200, {"commitUrl": address, "commitOid": found.commit, "success": True})

    def apply(self, repository: Repository, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
            repository.lfs.pop(value["path"], None)
        elif key == "lfsFile":
            repository.files[value["path"]] = self.hub.objects[value["oid"]]
            repository.lfs[value["path"]] = value["oid"]
        elif key == "deletedFile":
            repository.files.pop(value["path"])

    def info(self, repo: str) -> None:
        found = self.repository(repo)
        if found is not None:
            siblings = [{"rfilename": path} for path in found.files]
            self.answer(200, {"id": repo, "sha": found.commit, "siblings": siblings, "tags": [], "downloads": 0})

    def tree(self, repo: str) -> None:
        found = self.repository(repo)
        if found is not None:
            self.answer(200, [
                dict(type="file", path=path, size=len(content), oid=_git_oid(content),
                     **(dict(lfs=dict(oid=found.lfs[path], size=len(content), pointerSize=130)) if path in found.lfs
                        else {}))
                for path, content in found.files.items()
            ])  # fmt: skip

    def resolve(self, repo: str, path: str) -> None:
        found = self.repository(repo)
        if found is None:
            return
        content = found.files.get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        if path not in found.lfs:
            return self.answer(200, content, ETag=f'"{_git_oid(content)}"', X_Repo_Commit=found.commit)
        oid = found.lfs[path]
        linked = dict(X_Linked_Etag=f'"{oid}"', X_Linked_Size=str(len(content)), X_Repo_Commit=found.commit)
        storage = self.hub.url.replace("127.0.0.1", "localhost")  # the Hub keeps large files on another host
        return self.answer(302, b"", Location=f"{storage}/storage/{oid}", **linked)

    def get_object(self, oid: str) -> None:
        content = self.hub.objects[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(200, content, ETag=f'"{oid}"')
        start = int(wanted[1])
        return self.answer(206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
