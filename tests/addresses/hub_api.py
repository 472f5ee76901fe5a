"""A Hub with one dataset repository, `me/set`: what `HfFileSystem` asks of it, and nothing else."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

API = "/api/datasets/me/set"
COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """Its `files` are the content by path; `num_commits` counts what changed them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.num_commits = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def run_hub() -> Iterator[FakeHub]:
    """A Hub that runs until the block ends."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, files = unquote(urlsplit(self.path).path), self.server.files
        name = path.partition("/resolve/main/")[2]
        if path.startswith(f"{API}/tree/main"):
            found = self._list(path.removeprefix(f"{API}/tree/main").strip("/"), "recursive=true" in self.path)
            self._reply(found or {"error": "no such folder"}, 200 if found else 404, X_Error_Code="EntryNotFound")
        elif path == API:
            self._reply({"_id": "1", "id": "me/set", "sha": COMMIT, "siblings": []})
        elif name in files:
            data = files[name]
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            self._reply(data[int(first) : int(last) + 1] if last else data, 206 if last else 200, ETag='"x"')
        else:
            self._reply({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith(f"{API}/preupload/"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._reply({"files": modes})
        elif self.path.startswith(f"{API}/commit/"):
            self.server.num_commits += 1
            for item in map(json.loads, body.splitlines()):
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "deletedFile":
                    del self.server.files[item["value"]["path"]]
            self._reply(
                {
                    "success": True,
                    "commitUrl": f"{self.server.url}/datasets/me/set/commit/{COMMIT}",
                    "commitOid": COMMIT,
                }
            )
        else:
            self._reply({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def _list(self, folder: str, is_recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, data in sorted(self.server.files.items()):
            if folder and not name.startswith(f"{folder}/"):
                continue
            parts = name.removeprefix(folder).strip("/").split("/")
            for depth in range(1, len(parts) + 1 if is_recursive else 2):
                path = "/".join(filter(None, [folder, *parts[:depth]]))
                is_file = path == name
                found[path] = {
                    "type": "file" if is_file else "directory",
                    "oid": hashlib.sha1(data).hexdigest(),
                    "size": len(data) if is_file else 0,
                    "path": path,
                }
        return list(found.values())

    def _reply(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
