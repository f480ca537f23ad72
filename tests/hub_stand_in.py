"""A small real web server instead of the Hub: repositories that are made, read and written, with LFS."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from tests.processes import HUB_ADDRESS, forget_hub

TOKEN = "hf_test"
_LARGE = 10_000  # bytes from which a file goes by LFS


@dataclass
class Repo:
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class State:
    """All repositories by "models/org/name", large objects by their SHA-256, and what was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)  # large objects that arrived
    cut_after: int | None = None  # large objects that arrive before connections are cut


class _Handler(http.server.BaseHTTPRequestHandler):
    """The routes by which huggingface_hub, datasets and transformers read, and by which upload_folder writes."""

    protocol_version = "HTTP/1.1"
    state: State

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.state.asked.append(f"{self.command} {path}")
        if path.startswith("/api/whoami"):
            self._json(
                {"name": "org", "type": "user"} if self._trusted() else {"error": "no"}, 200 if self._trusted() else 401
            )
            return
        repo, rest = self._find(path)
        if repo is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif rest == "" or rest.startswith("revision/"):
            name = path.split("/api/")[1].partition("/")[2].partition("/revision/")[0]
            self._json({"id": name, "sha": repo.sha, "private": repo.private, "tags": [], "downloads": 0, "likes": 0,
                        "siblings": [{"rfilename": name} for name in sorted(repo.files)]})  # fmt: skip
        elif rest.startswith("tree/"):
            self._json(self._tree(repo, rest.split("/", 2)[2] if rest.count("/") > 1 else ""))
        elif rest.startswith("resolve/"):
            self._file(repo, rest.split("/", 2)[2])
        else:
            self._json({"error": "not found"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.state.asked.append(f"POST {path}")
        body = self._body()
        if not self._trusted():
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            key = f"{asked.get('type') or 'model'}s/{name}"
            if key in self.state.repos:
                self._json({"error": "exists", "url": name}, 409)
                return
            self.state.repos[key] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
            self._json({"url": f"http://{self.headers['Host']}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] > _LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": [self._offer(o) for o in json.loads(body)["objects"]]})
        elif "/branch/" in path:
            self._json({})
        elif "/paths-info/" in path:
            repo, _ = self._find(path)
            try:
                wanted = json.loads(body)["paths"]
            except ValueError:  # a form
                wanted = parse_qs(body.decode()).get("paths", [])
            assert repo is not None
            self._json([self._entry(repo, name) for name in sorted(repo.files) if name in wanted])
        elif "/commit/" in path:
            self._commit(path, body)
        else:
            self._json({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        state = self.state
        if state.cut_after is not None and len(state.sent) >= state.cut_after:
            self.rfile.read(1000)
            self.close_connection = True
            self.connection.close()
            return
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            self._json({"error": "broken"}, 400)
            return
        state.objects[oid] = content
        state.sent.append(oid)
        self._json({})

    def _offer(self, asked: dict) -> dict:
        oid = asked["oid"]
        if oid in self.state.objects:
            return {"oid": oid, "size": asked["size"]}
        href = f"http://{self.headers['Host']}/lfs/{oid}"
        return {"oid": oid, "size": asked["size"], "actions": {"upload": {"href": href}}}

    def _commit(self, path: str, body: bytes) -> None:
        repo, _ = self._find(path)
        assert repo is not None
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repo.files[value["path"]] = self.state.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                repo.files.pop(value["path"], None)
        repo.commits += 1
        url = f"http://{self.headers['Host']}/{path.split('/api/')[1].partition('/commit/')[0].removeprefix('models/')}/commit/{repo.sha}"
        answer = {"success": True, "commitOid": repo.sha, "commitUrl": url}
        if "create_pr=1" in self.path:
            answer["pullRequestUrl"] = url.replace(f"/commit/{repo.sha}", "/discussions/1")
        self._json(answer)

    def _trusted(self) -> bool:
        return self.headers.get("Authorization", "") == f"Bearer {TOKEN}"

    def _find(self, path: str) -> tuple[Repo | None, str]:
        """The repository that a path is about, and what follows its name."""
        for key, repo in self.state.repos.items():
            kind, _, name = key.partition("/")
            for start in (f"/api/{key}", f"/{name}" if kind == "models" else f"/{key}"):
                if path == start or path.startswith((f"{start}/", f"{start}.git")):
                    return repo, path[len(start) :].lstrip("/")
        return None, ""

    def _tree(self, repo: Repo, within: str) -> list[dict]:
        whole = "recursive=true" in self.path.lower()
        found: dict[str, dict] = {}
        for name in sorted(repo.files):
            if not within or name.startswith(f"{within}/"):
                inner = name[len(within) :].strip("/")
                if whole or "/" not in inner:
                    found[name] = self._entry(repo, name)
                else:
                    folder = f"{within}/{inner.partition('/')[0]}".strip("/")
                    found[folder] = {"type": "directory", "oid": repo.sha, "size": 0, "path": folder}
        return list(found.values())

    @staticmethod
    def _entry(repo: Repo, name: str) -> dict:
        content = repo.files[name]
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

    def _file(self, repo: Repo, name: str) -> None:
        if name not in repo.files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = repo.files[name]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": repo.sha,
            "Accept-Ranges": "bytes",
        }
        span, status = self.headers.get("Range", ""), 200
        if span.startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            total = len(content)
            end = min(int(last or total - 1), total - 1)
            content, status = content[int(first) : end + 1], 206
            headers["Content-Range"] = f"bytes {first}-{end}/{total}"
        self._send(content, status, {**headers, "Content-Type": "application/octet-stream"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

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
def hub(folder: Path | None = None, repo: str = "") -> Iterator[tuple[str, State]]:
    """The address of a Hub, with a data set made of a folder if one is given, and its state.

    Processes of `tests.processes` that are given `hub=True` reach it, and know nothing of one before it.
    """
    forget_hub()
    state = State()
    if folder is not None:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        state.repos[f"datasets/{repo}"] = Repo(files)
    handler = type("Handler", (_Handler,), {"state": state})
    with http.server.ThreadingHTTPServer(HUB_ADDRESS, handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{HUB_ADDRESS[1]}", state
        finally:
            server.shutdown()
