"""The few endpoints of the Hub that a push needs, on localhost; what was committed lands in `FakeHub.files`."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class FakeHub:
    """Serves while the `with` block runs; `endpoint` is its address."""

    def __enter__(self) -> "FakeHub":
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, content: dict) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                hub.requests.append(f"GET {self.path}")
                name = {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
                self.reply(name if self.path.endswith("whoami-v2") else {"id": "me/draft", "sha": COMMIT})

            def do_POST(self) -> None:
                hub.requests.append(f"POST {self.path}")
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if "/preupload/" in self.path:
                    files = json.loads(body)["files"]
                    modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                    self.reply({"files": modes})
                elif "/commit/" in self.path:
                    for line in body.decode().splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    self.reply(
                        {
                            "commitUrl": f"{hub.endpoint}/me/draft/commit/{'0' * 40}",
                            "commitOid": "0" * 40,
                            "success": True,
                        }
                    )
                else:
                    self.reply({"url": f"{hub.endpoint}/me/draft", "name": "me/draft", "warnings": [], "errors": []})

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()
