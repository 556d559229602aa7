"""A Hub on 127.0.0.1, in memory: repositories with commits, tags and pull requests; large files by LFS; tokens; faults.

The libraries run unmodified against it: HF_ENDPOINT=server.url HF_HUB_DISABLE_XET=1 HF_TOKEN=WRITER.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

WRITER, READER = "writer", "reader"  # the tokens that it knows
API = r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([\w-]+)(?:/(refs/\w+/\w+|[^/]+)(?:/(.*))?)?)?"
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
SPACE = {"sdk": ("gradio", "docker", "static"), "colorFrom": COLOURS, "colorTo": COLOURS}
LARGE = (".safetensors", ".parquet", ".png", ".gif")


@dataclass
class Blob:
    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # in the order they were made
    heads: dict[str, str] = field(default_factory=dict)  # main, refs/pr/1, ...
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)  # titles

    def commit(self, head: str, files: dict[str, Blob]) -> str:
        listing = json.dumps([len(self.commits), {name: blob.sha256 for name, blob in sorted(files.items())}])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha], self.heads[head] = files, sha
        return sha

    def sha(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.heads.get(revision) or self.tags.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {name: blob.data for name, blob in self.commits[self.sha(revision)].items()}


class Answer(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, body=b"", **headers: str):
        self.status, self.headers = status, headers
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = (self.command, unquote(url.path))
        with hub.lock:
            hub.requests.append(request)
            fault = hub.fault(len(hub.requests), *request) if hub.fault else None
            if callable(fault):  # no answer
                fault(lambda: self.act(*request))
                self.close_connection = True
                return
            answer = self.act(*request) if fault is None else Answer(fault, {"error": "as told"}, Retry_After="0")
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def act(self, method: str, path: str) -> Answer:
        try:
            return self.server.hub.route(self, method, path)
        except Answer as raised:
            return raised


def cut(act) -> None:
    """A fault: the connection ends, nothing is done."""


def lost(act) -> None:
    """A fault: it is done, but the connection ends before the answer."""
    act()


class Hub:
    """What the server knows. `requests`: all so far, (method, path). `fault(number, method, path)` decides
    what becomes of a request: None as usual, a status, or a function like `cut` and `lost`, after which the connection
    ends. `corrupt`: names of files of which a byte is turned when they are read.
    """

    def __init__(self, url: str):
        self.url = url
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[int, str, str], object] | None = None
        self.corrupt: set[str] = set()

    def add(self, kind: str, name: str, folder: Path, private: bool = False) -> Repo:
        """A repository with the files of a folder."""
        repo = self.repos[kind, name] = Repo(private)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        repo.commit("main", {name: Blob(data, name.endswith(LARGE)) for name, data in names.items()})
        return repo

    def reads(self) -> set[str]:
        """Names of the files whose content was fetched."""
        paths = [path.split("/resolve/", 1)[1] for way, path in self.requests if way == "GET" and "/resolve/" in path]
        return {path.partition("/")[2] for path in paths}

    def route(self, request: _Handler, method: str, path: str) -> Answer:
        if path == "/api/repos/create":
            return self.create(request)
        if path == "/api/validate-yaml":
            return validate(json.loads(request.content))
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            return self.put(found[1], request.content)
        if found := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repo(request, found[1] or "model", found[2], write=True)
            return self.batch(json.loads(request.content))
        if found := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/(refs/\w+/\w+|[^/]+)/(.+)", path):
            repo = self.repo(request, found[1] or "model", found[2])
            return self.resolve(request, repo, *found.groups()[2:])
        if found := re.fullmatch(API, path):
            kind, name, action, revision, rest = found.groups()
            writing = action in ("preupload", "commit", "tag")
            repo = self.repo(request, kind, name, write=writing)
            action = "info" if action in (None, "revision") else action.replace("-", "_")
            if hasattr(self, f"on_{action}"):
                return getattr(self, f"on_{action}")(request, repo, (kind, name), revision or "main", rest or "")
        return Answer(404, {"error": f"no such page: {method} {path}"})

    def repo(self, request: _Handler, kind: str, name: str, write: bool = False) -> Repo:
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, X_Error_Message=message)
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and not token):
            raise Answer(404 if token else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if write and token != WRITER:
            raise Answer(403 if token else 401, {"error": "no write access"}, X_Error_Message="no write access")
        return repo

    def create(self, request: _Handler) -> Answer:
        body = json.loads(request.content)
        kind, name = body.get("type", "model"), f"{body['organization']}/{body['name']}"
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token != WRITER:
            return Answer(403 if token else 401, {"error": "no write access"})
        if kind == "space" and body.get("sdk") not in ("gradio", "docker", "static"):
            return Answer(400, {"error": "a Space needs an sdk"})
        address = {"url": self.page(kind, name)}
        if (kind, name) in self.repos:
            return Answer(409, address)
        repo = self.repos[kind, name] = Repo(body.get("visibility") == "private")
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return Answer(200, address)

    def page(self, kind: str, name: str) -> str:
        return f"{self.url}/{'' if kind == 'model' else kind + 's/'}{name}"

    def put(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            return Answer(400, {"error": "the content has another SHA-256"})
        self.large[oid] = content
        return Answer(200)

    def batch(self, body: dict) -> Answer:
        objects = [
            {key: entry[key] for key in ("oid", "size")}
            | (
                {}
                if entry["oid"] in self.large
                else {"actions": {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}}
            )
            for entry in body["objects"]
        ]
        return Answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/json")

    def resolve(self, request: _Handler, repo: Repo, revision: str, name: str) -> Answer:
        sha = repo.sha(revision)
        if sha is None:
            return Answer(404, X_Error_Code="RevisionNotFound")
        blob = repo.commits[sha].get(name)
        if blob is None:
            return Answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        headers = {"ETag": f'"{blob.oid}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if blob.large:
            headers |= {"X_Linked_Etag": f'"{blob.sha256}"', "X_Linked_Size": str(len(blob.data))}
        data = blob.data
        if name in self.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 64])
        if "Range" in request.headers and request.command == "GET":
            first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return Answer(206, data[first : last + 1], **headers)
        return Answer(200, data, **headers)

    def on_info(self, request, repo: Repo, name, revision: str, rest: str) -> Answer:
        sha = repo.sha(revision)
        if sha is None:
            return Answer(404, X_Error_Code="RevisionNotFound")
        files = repo.commits[sha]
        card = REGEX_YAML_BLOCK.search(files["README.md"].data.decode()) if "README.md" in files else None
        return Answer(
            200,
            {"id": name[1], "sha": sha, "private": repo.private, "tags": [], "downloads": 0}
            | {"cardData": yaml.safe_load(card[2]) if card else None}
            | {"siblings": [{"rfilename": file} for file in files]},
        )

    def on_tree(self, request, repo: Repo, name, revision: str, rest: str) -> Answer:
        files = repo.commits.get(repo.sha(revision))
        if files is None:
            return Answer(404, X_Error_Code="RevisionNotFound")
        start = f"{rest.rstrip('/')}/" if rest else ""
        inside = {file: blob for file, blob in files.items() if file.startswith(start)}
        if start and not inside:
            return Answer(404, X_Error_Code="EntryNotFound")
        folders = {parent.as_posix() for file in inside for parent in Path(file).parents} - {"."}
        folders = {folder for folder in folders if folder.startswith(start)}
        entries = [entry_of(file, blob) for file, blob in inside.items()]
        entries += [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders]
        if request.query.get("recursive", "false").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"][len(start) :]]
        return Answer(200, sorted(entries, key=lambda entry: entry["path"]))

    def on_paths_info(self, request, repo: Repo, name, revision: str, rest: str) -> Answer:
        files = repo.commits.get(repo.sha(revision), {})
        if request.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(request.content)["paths"]
        else:
            paths = parse_qs(request.content.decode()).get("paths", [])
        return Answer(200, [entry_of(path, files[path]) for path in paths if path in files])

    def on_refs(self, request, repo: Repo, name, revision: str, rest: str) -> Answer:
        def listed(refs: dict[str, str], kind: str) -> list[dict]:
            return [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": sha} for ref, sha in refs.items()]

        branches = {ref: sha for ref, sha in repo.heads.items() if not ref.startswith("refs/")}
        return Answer(200, {"branches": listed(branches, "heads"), "converts": [], "tags": listed(repo.tags, "tags")})

    def on_discussions(self, request, repo: Repo, name, revision: str, rest: str) -> Answer:
        pulls = [
            {"title": title, "num": number, "author": {"name": WRITER}, "isPullRequest": True, "status": "open"}
            | {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name[1], "type": name[0]}}
            for number, title in enumerate(repo.pulls, 1)
        ]
        return Answer(200, {"discussions": pulls, "count": len(pulls), "start": 0})

    def on_preupload(self, request, repo: Repo, name, revision: str, rest: str) -> Answer:
        files = repo.commits.get(repo.sha(revision))
        if files is None:
            return Answer(404, X_Error_Code="RevisionNotFound")
        answer = []
        for entry in json.loads(request.content)["files"]:
            path, known = entry["path"], files.get(entry["path"])
            large = path.endswith(LARGE)
            oid = None if known is None else known.sha256 if large else known.oid
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer(200, {"files": answer})

    def on_commit(self, request, repo: Repo, name, revision: str, rest: str) -> Answer:
        lines = [json.loads(line) for line in request.content.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        pull = "create_pr" in request.query
        if header.get("parentCommit") not in (None, repo.sha(revision)):
            return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repo.commits[repo.sha(revision)])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    return Answer(400, {"error": f"LFS object of {value['path']} was never uploaded"})
                files[value["path"]] = Blob(self.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if pull:
            repo.pulls.append(header["summary"])
            revision = f"refs/pr/{len(repo.pulls)}"
        sha = repo.commit(revision, files)
        page = self.page(*name)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}"}
        return Answer(200, answer | ({"pullRequestUrl": f"{page}/discussions/{len(repo.pulls)}"} if pull else {}))

    def on_tag(self, request, repo: Repo, name, revision: str, rest: str) -> Answer:
        if request.command == "DELETE":  # the tag stands where a revision does
            return Answer(200) if repo.tags.pop(revision, None) else Answer(404, X_Error_Code="RevisionNotFound")
        tag = json.loads(request.content)["tag"]
        if repo.sha(revision) is None:
            return Answer(404, X_Error_Code="RevisionNotFound")
        if tag in repo.tags:
            return Answer(409, {"error": "Tag reference exists already"})
        repo.tags[tag] = repo.sha(revision)
        return Answer(200)


def entry_of(path: str, blob: Blob) -> dict:
    large = {"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.large else {}
    return {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)} | large


def validate(body: dict) -> Answer:
    """The Hub checks more; this refuses what is no mapping, lacks a licence, or is no header of a Space."""
    found = REGEX_YAML_BLOCK.search(body["content"])
    data = yaml.safe_load(found[2]) if found else None
    if not isinstance(data, dict) or not data.get("license"):
        return Answer(400, {"errors": [{"message": '"license" is required'}], "warnings": []})
    if body.get("repoType") == "space":
        wrong = [f'"{key}" must be one of {of}' for key, of in SPACE.items() if data.get(key) not in of]
        wrong += [f'"{key}" is required' for key in ("title", "emoji", "app_file", "sdk_version") if not data.get(key)]
        if wrong:
            return Answer(400, {"errors": [{"message": message} for message in wrong], "warnings": []})
    return Answer(200, {"errors": [], "warnings": []})


@contextmanager
def serve():
    """A running, empty Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
