"""Local HTTP server that serves files as a web host and as a Hugging Face hub, with faults on request."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


@dataclass
class Served:
    """A served file.

    Attributes:
        content: its bytes.
        content_type: as the server tells it.
        cut_after: bytes after which the connection is closed, for each of the first requests.
        ranges: the server sends a part of the file on request.
        status: HTTP status in place of 200.
    """

    content: bytes
    content_type: str = "application/octet-stream"
    cut_after: list[int] = field(default_factory=list)
    ranges: bool = True
    status: int = 200


@dataclass
class FileServer:
    """The server: `files` maps a path to what is served; `requests` collects (method, path, Range)."""

    url: str
    files: dict[str, Served]
    requests: list[tuple[str, str, str | None]]

    def add(self, path: str, content: bytes, **options: Any) -> str:
        """Serve a file, and return its address."""
        self.files[path] = Served(content, **options)
        return f"{self.url}{path}"

    def add_repository(self, name: str, files: dict[str, bytes]) -> None:
        """Serve a repository of the Hugging Face hub."""
        for file_name, content in files.items():
            self.add(f"/{name}/resolve/main/{file_name}", content)
            self.files[f"/{name}/resolve/{COMMIT}/{file_name}"] = self.files[
                f"/{name}/resolve/main/{file_name}"
            ]
        listing = [
            {"type": "file", "path": file_name, "size": len(content), "oid": COMMIT}
            for file_name, content in files.items()
        ]
        listed = json.dumps(listing).encode()
        self.add(f"/api/models/{name}/tree/main", listed, content_type="application/json")


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Run the server in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve(body=True)

        def do_HEAD(self) -> None:
            self._serve(body=False)

        def _serve(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            asked = self.headers.get("Range")
            found.requests.append((self.command, path, asked))
            served = found.files.get(path)
            if served is None or served.status != 200:
                self.send_error(404 if served is None else served.status)
                return
            tag = f'"{hashlib.sha256(served.content).hexdigest()}"'
            start, status = 0, 200
            unchanged = self.headers.get("If-Range") in (None, tag)
            if asked and served.ranges and unchanged:
                start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            part = served.content[start:]
            self.send_response(status)
            self.send_header("Content-Type", served.content_type)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", tag)
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 206:
                size = len(served.content)
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.end_headers()
            if body:
                self.wfile.write(part[: served.cut_after.pop(0)] if served.cut_after else part)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = FileServer(f"http://127.0.0.1:{server.server_port}", {}, [])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
