"""A small server that speaks the hub's protocol over loopback, for a folder laid out as `org/name/files`."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the repositories in `folder`; gives the endpoint, and the growing list of paths fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
                return self.answer_repository(folder / match[1])
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
                return self.answer_tree(folder / match[1])
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                return self.answer_file(folder / match[1] / match[2])
            self.answer(404, b"{}")

        def answer_repository(self, repository):
            if not repository.is_dir():
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = [{"rfilename": str(p.relative_to(repository))} for p in sorted(files_in(repository))]
            name = str(repository.relative_to(folder))
            self.answer_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": files})

        def answer_tree(self, repository):
            self.answer_json([
                {"type": "file", "path": str(path.relative_to(repository)), "size": path.stat().st_size}
                | {"oid": etag(path)}
                for path in sorted(files_in(repository))
            ])  # fmt: skip

        def answer_file(self, path):
            if not path.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            if self.command == "GET":
                fetched.append(str(path.relative_to(folder)))
            self.answer(200, path.read_bytes(), {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT})

        def answer_json(self, value):
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status, body, headers=None):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_in(repository: Path):
    return [p for p in repository.rglob("*") if p.is_file()]


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
