"""A fake hub on this machine that sends scripted responses. The downloader in these tests is the real one."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: Status, headers and body for a method and a path; None drops the connection.
Answer = Callable[[str, str], tuple[int, Mapping[str, str], bytes] | None]

COMMIT = "1" * 40


@contextmanager
def serve(answer: Answer) -> Iterator[str]:
    """Run the fake hub; gives its address, for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reply = answer(self.command, self.path)
            if reply is None:
                self.close_connection = True
                return
            status, headers, body = reply
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if status == 200 and wanted and self.command == "GET":
                status, body = 206, body[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Repository:
    """An answer: the repository ``some/model``, with the files of a folder.

    Attributes:
        requests: method and path of each request, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str]] = []

    def __call__(self, method: str, path: str) -> tuple[int, Mapping[str, str], bytes]:
        self.requests.append((method, path))
        if path.startswith("/api/models/some/model/tree/"):
            files = [{"type": "file", "path": file.name, "oid": COMMIT, "size": file.stat().st_size} for file in self._files()]
            return 200, {}, json.dumps(files).encode()
        if path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": file.name} for file in self._files()]
            return 200, {}, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode()
        file = self.folder / path.rpartition("/")[2]
        if f"/some/model/resolve/{COMMIT}/" not in path or not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = file.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content

    def _files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def got(self) -> list[str]:
        """The names of the files that were requested, in order; a file whose header was read is in it twice."""
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]


def refuse(status: int, code: str | None = None) -> Answer:
    """Refuse every request; ``code`` is the hub's error code for the reason."""
    return lambda method, path: (status, {"X-Error-Code": code} if code else {}, b'{"error": "refused"}')


def drop_downloads(method: str, path: str) -> tuple[int, Mapping[str, str], bytes] | None:
    """A repository of one file whose download breaks off after the first byte."""
    if "/tree/" in path:
        return 200, {}, json.dumps([{"type": "file", "path": "config.json", "oid": COMMIT, "size": 100}]).encode()
    if path.startswith("/api/"):
        return 200, {}, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}).encode()
    return 200, {"ETag": '"abc"', "X-Repo-Commit": COMMIT, "Content-Length": "100"}, b"{"


def captive_portal(method: str, path: str) -> tuple[int, Mapping[str, str], bytes]:
    """The login page that a hotel's network returns for every request."""
    return 200, {"Content-Type": "text/html"}, b"<html>Please log in</html>"
