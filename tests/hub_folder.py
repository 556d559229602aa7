"""A read-only Hub on localhost that serves one dataset folder, for tests that stream from the Hub without a network."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content) -> None:
        self._send(200, json.dumps(content).encode(), Content_Type="application/json")

    def _entry(self, path: Path) -> dict:
        name = path.relative_to(self.server.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": SHA, "size": 0}
        return {
            "type": "file",
            "path": name,
            "oid": hashlib.sha1(name.encode()).hexdigest(),
            "size": path.stat().st_size,
        }

    def do_POST(self):
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if self.headers.get("Content-Type", "").startswith("application/json"):
            body = json.loads(next(iter(body)) if body else "{}")
        paths = [self.server.folder / path for path in body.get("paths", [])]
        self._json([self._entry(path) for path in paths if path.exists()])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        folder, url = self.server.folder, urlsplit(self.path)
        path, repo = unquote(url.path), self.server.repo
        files = sorted(item for item in folder.rglob("*") if item.is_file())
        if path.startswith(f"/api/datasets/{repo}/tree/"):
            start = folder / path.split("/tree/", 1)[1].partition("/")[2]
            if not start.is_dir():
                return self._send(404, b"", X_Error_Code="EntryNotFound")
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            return self._json(
                [self._entry(item) for item in sorted(start.rglob("*") if recursive else start.iterdir())]
            )
        if path == f"/api/datasets/{repo}" or path.startswith(f"/api/datasets/{repo}/revision/"):
            siblings = [{"rfilename": item.relative_to(folder).as_posix()} for item in files]
            return self._json(
                {"id": repo, "sha": SHA, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
            )
        if path.startswith(f"/datasets/{repo}/resolve/"):
            name = path.split("/resolve/", 1)[1].partition("/")[2]
            if not (folder / name).is_file():
                return self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
            return self._file(folder / name, name)
        return self._send(404, b"", X_Error_Code="RepoNotFound")

    def _file(self, path: Path, name: str) -> None:
        whole = path.read_bytes()
        if self.command == "GET":
            self.server.reads[name] = self.server.reads.get(name, 0) + 1
            if self.server.failing.get(name, 0) > 0:
                self.server.failing[name] -= 1
                return self._send(403, b"")  # a status that clients do not retry on their own
        headers = {"ETag": f'"{hashlib.sha1(whole).hexdigest()}"', "X_Repo_Commit": SHA, "Accept_Ranges": "bytes"}
        if "Range" in self.headers and self.command == "GET":
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(whole) - 1), len(whole) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(whole)}"
            return self._send(206, whole[first : last + 1], **headers)
        return self._send(200, whole, **headers)


@contextmanager
def serve(folder: Path, repo: str = "someone/demonstrations"):
    """Server of `folder` as dataset `repo`: `url`; `failing[file name]`, how many of the next reads of a file fail."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.folder, server.repo, server.failing, server.reads = folder, repo, {}, {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
