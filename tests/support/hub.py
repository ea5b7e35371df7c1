"""A fake hub on this machine that sends scripted responses. The downloader in these tests is the real one."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
