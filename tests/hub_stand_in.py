"""A small real web server in the place of the Hub, for reading one data set's files from a folder."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(http.server.BaseHTTPRequestHandler):
    """The routes by which huggingface_hub's file system lists and reads a repository."""

    protocol_version = "HTTP/1.1"
    folder: Path
    repo: str
    asked: list[str]

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"{self.command} {path}")
        api = f"/api/datasets/{self.repo}"
        if path == api or path.startswith(f"{api}/revision/"):
            self._json({"id": self.repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0,
                        "siblings": [{"rfilename": name} for name in self._names()]})  # fmt: skip
        elif path.startswith(f"{api}/tree/"):
            self._json(
                self._tree(path.removeprefix(f"{api}/tree/").partition("/")[2], "recursive=true" in self.path.lower())
            )
        elif path.startswith(f"/datasets/{self.repo}/resolve/"):
            self._file(path.split("/resolve/")[1].partition("/")[2])
        else:
            self._json({"error": "not found"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if not path.startswith(f"/api/datasets/{self.repo}/paths-info/"):
            self._json({"error": "not found"}, 404)
            return
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:  # a form
            from urllib.parse import parse_qs

            wanted = parse_qs(body).get("paths", [])
        self._json([self._entry(name) for name in self._names() if name in wanted])

    def _names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def _tree(self, within: str, whole: bool) -> list[dict]:
        found: dict[str, dict] = {}
        for name in self._names():
            if not within or name.startswith(f"{within}/"):
                inner = name[len(within) :].strip("/")
                if whole or "/" not in inner:
                    found[name] = self._entry(name)
                else:
                    folder = f"{within}/{inner.partition('/')[0]}".strip("/")
                    found[folder] = {"type": "directory", "oid": COMMIT, "size": 0, "path": folder}
        return list(found.values())

    def _entry(self, name: str) -> dict:
        content = (self.folder / name).read_bytes()
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

    def _file(self, name: str) -> None:
        path = self.folder / name
        if name not in self._names():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        span, status = self.headers.get("Range", ""), 200
        if span.startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            total = len(content)
            end = min(int(last or total - 1), total - 1)
            content, status = content[int(first) : end + 1], 206
            headers["Content-Range"] = f"bytes {first}-{end}/{total}"
        self._send(content, status, {**headers, "Content-Type": "application/octet-stream"})

    def _json(self, value: object, status: int = 200, headers: dict | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hub(folder: Path, repo: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub with one data set, and what it is asked for."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"folder": folder, "repo": repo, "asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
