"""A Hub on this machine, for huggingface_hub's own client as it is: HF_ENDPOINT names it.

Serves the part of the Hub's API that downloading and pushing models takes: repositories with
branches and commits, trees, files by ranges, large files behind a redirect, as LFS stores them, and
errors under the Hub's own codes. It keeps all in memory and counts what it serves.

    with Hub() as hub:
        hub.add("org/name", {"config.json": b"{}"})
        subprocess.run([...], env=os.environ | hub.environment(cache_directory))
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

READER, WRITER = "hf_reader", "hf_writer"  # tokens
LARGE = (".safetensors", ".bin", ".model")  # as a new repository's .gitattributes has them
ATTRIBUTES = b"".join(b"*%s filter=lfs\n" % suffix.encode() for suffix in LARGE)


@dataclass(frozen=True)
class Blob:
    """A file's content, under git's name for it and, of a large one, LFS's."""

    data: bytes = field(repr=False)
    large: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree's API states it."""
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "oid": self.oid,
            "size": len(self.data),
        }
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


Tree = Mapping[str, Blob]


class Repository:
    """Commits, and the branches that name them."""

    def __init__(self, *, private: bool = False, gated: bool = False) -> None:
        self.private, self.gated = private, gated
        self.commits: dict[str, Tree] = {}
        self.messages: dict[str, list[str]] = {"main": []}
        self.branches: dict[str, str] = {}
        self.commit("main", {".gitattributes": Blob(ATTRIBUTES, large=False)}, "initial commit")

    def commit(self, branch: str, tree: Tree, message: str) -> str:
        before = self.branches.get(branch, "")
        content = [before, message, *(f"{path} {tree[path].etag}" for path in sorted(tree))]
        sha = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        self.messages[branch].append(message)
        return sha

    def branch(self, name: str, start: str) -> None:
        self.branches[name] = self.branches[start]
        self.messages[name] = list(self.messages[start])

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """The content of a branch."""
        return {path: blob.data for path, blob in self.commits[self.branches[branch]].items()}


class Refusal(Exception):  # noqa: N818  # what the Hub says, no error of the server's
    """An answer other than 200, with the code that the client tells errors by."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Hub:
    """The server, listening while it is entered."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files, by their SHA-256
        self.served: Counter[str] = Counter()  # bytes of files, by repository, commit and path
        self.requests: list[str] = []  # method and path
        self.uploaded: list[str] = []  # SHA-256 of the large files that were sent
        self.uploads_left: int | None = None  # it answers no more than so many
        self.complaint = ""  # about the metadata of cards
        self.lock = Lock()

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Of another host, as on the Hub: the client's token doesn't go there.
        self.storage = f"http://localhost:{self._server.server_port}/storage"
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a process that is to use this Hub, and a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # there is no Xet storage here: large files go by LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def add(self, name: str, files: Mapping[str, bytes], **kind: bool) -> str:
        """Make a repository, or a commit on its main branch; returns the commit."""
        repository = self.repositories.setdefault(name, Repository(**kind))
        tree = {path: Blob(data, path.endswith(LARGE)) for path, data in files.items()}
        self.objects |= {blob.sha256: blob.data for blob in tree.values() if blob.large}
        old = repository.commits[repository.branches["main"]]
        return repository.commit("main", {**old, **tree}, "add")

    def add_directory(self, name: str, directory: Path, **kind: bool) -> str:
        files = {
            str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }
        return self.add(name, files, **kind)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # the base class's names

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        method = "GET" if self.command == "HEAD" else self.command
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
        try:
            for wanted, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and wanted == method:
                    answer(self, *map(unquote, match.groups()))
                    return
            raise Refusal(404, message=f"no such route: {self.command} {url.path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            text = json.dumps({"error": refusal.message}).encode()
            self._send(text, refusal.status, {k: v for k, v in headers.items() if v})

    def _send(
        self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    # What a request is about, and whether it may be

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token not in (READER, WRITER)):
            raise Refusal(404 if self._token else 401, "RepoNotFound", "Repository not found")
        if write and self._token != WRITER:
            raise Refusal(403, message="you don't have the rights to write there")
        return repository

    def _commit(self, name: str, revision: str) -> tuple[str, Tree]:
        repository = self._repository(name)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    # Reading

    def model(self, name: str, revision: str = "main") -> None:
        sha, tree = self._commit(name, revision)
        repository = self.hub.repositories[name]
        siblings = []
        for path, blob in tree.items():
            entry = blob.entry(path)
            siblings.append({"rfilename": path, "size": entry["size"], "blobId": blob.oid})
            if blob.large:
                siblings[-1]["lfs"] = {
                    "sha256": blob.sha256,
                    "size": entry["size"],
                    "pointerSize": 134,
                }
        self._json(
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        _, tree = self._commit(name, revision)
        self._json(list(_entries(tree, folder, self.query.get("recursive", [""])[0].lower())))

    def paths_info(self, name: str, revision: str) -> None:
        _, tree = self._commit(name, revision)
        paths = json.loads(self.body)["paths"] if self.body[:1] == b"{" else None
        wanted = paths if paths is not None else parse_qs(self.body.decode())["paths"]
        self._json([tree[path].entry(path) for path in wanted if path in tree])

    def refs(self, name: str) -> None:
        branches = self._repository(name).branches
        refs = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
            for branch, sha in branches.items()
        ]
        self._json({"branches": refs, "converts": [], "tags": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha, tree = self._commit(name, revision)
        if self.hub.repositories[name].gated and self._token not in (READER, WRITER):
            status = 403 if self._token else 401
            raise Refusal(status, "GatedRepo", f"Access to model {name} is restricted.")
        if path not in tree:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        blob = tree[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"'}
        if not blob.large:
            self._file(blob.data, f"{name}/{path}", headers)
            return
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        place = f"{self.hub.storage}/{blob.sha256}?name={name}/{path}"
        self._send(b"", 302, headers | {"Location": place})

    def stored(self, sha256: str) -> None:
        if sha256 not in self.hub.objects:
            raise Refusal(404)
        name = self.query.get("name", [sha256])[0]
        self._file(self.hub.objects[sha256], name, {"ETag": f'"{sha256}"'})

    def _file(self, data: bytes, name: str, headers: Mapping[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        status, extra = 200, {"Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            begin, end = int(match[1]), int(match[2] or len(data) - 1)
            if begin >= len(data):
                raise Refusal(416)
            extra["Content-Range"] = f"bytes {begin}-{min(end, len(data) - 1)}/{len(data)}"
            data, status = data[begin : end + 1], 206
        if self.command == "GET":
            with self.hub.lock:
                self.hub.served[name] += len(data)
        self._send(data, status, {**headers, **extra})

    # Writing

    def create(self) -> None:
        if self._token != WRITER:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'writer'}/{asked['name']}"
        if name in self.hub.repositories:
            url = f"{self.hub.endpoint}/{name}"
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=private)
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "0"})

    def branch(self, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, message="Reference already exists")
        repository.branch(branch, "main")
        self._json({"success": True})

    def validate(self) -> None:
        errors = [{"message": self.hub.complaint}] if self.hub.complaint else []
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def whoami(self) -> None:
        if self._token not in (READER, WRITER):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        self._json({"type": "user", "name": self._token.removeprefix("hf_"), "orgs": []})

    def preupload(self, name: str, revision: str) -> None:
        self._repository(name, write=True)
        _, tree = self._commit(name, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": tree[file["path"]].etag if file["path"] in tree else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, name: str) -> None:
        self._repository(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.storage}/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, sha256: str) -> None:
        with self.hub.lock:
            if self.hub.uploads_left is not None:
                if self.hub.uploads_left == 0:
                    raise Refusal(400, message="the storage is away")
                self.hub.uploads_left -= 1
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, message="the content is not what its name says")
        self.hub.objects[sha256] = self.body
        self.hub.uploaded.append(sha256)
        self._send(b"")

    def commit(self, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        sha, tree = self._commit(name, branch)
        tree, message = dict(tree), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                    if value.get("parentCommit", sha) != sha:
                        raise Refusal(412, message="A commit has happened since")
                case "file":
                    tree[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
                case "lfsFile" if value["oid"] in self.hub.objects:
                    tree[value["path"]] = Blob(self.hub.objects[value["oid"]], large=True)
                case "deletedFile" if value["path"] in tree:
                    del tree[value["path"]]
                case other:
                    raise Refusal(400, message=f"{other} of {value} can't be")
        sha = repository.commit(branch, tree, message)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _entries(tree: Tree, folder: str, recursive: str) -> Iterator[dict[str, Any]]:
    """Of a folder: its files and folders, and if asked those inside."""
    prefix = f"{folder}/" if folder else ""
    folders = set()
    for path, blob in tree.items():
        if not path.startswith(prefix):
            continue
        *parents, _ = path.removeprefix(prefix).split("/")
        if not parents or recursive in ("true", "1"):
            yield blob.entry(path)
        if parents and parents[0] not in folders:
            folders.add(parents[0])
            yield {"type": "directory", "path": prefix + parents[0], "oid": "0" * 40, "size": 0}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_NAME}", _Handler.model),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.model),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/?", _Handler.tree),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/(.+)", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", r"/storage/(\w+)", _Handler.stored),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/(\w+)", _Handler.store),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
)
