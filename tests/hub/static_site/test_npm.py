"""Packages of npm: by their hashes only, from a folder, the cache or the registry."""

import hashlib
import http.server
import threading
from base64 import b64encode

import pytest

from bifocal.files import default_cache
from bifocal.hub.static_site import npm
from bifocal.hub.static_site.npm import ONNXRUNTIME, TRANSFORMERS, NpmPackage, PackageError, load_tarballs

CONTENT = b"a tarball"
PACKAGE = NpmPackage("@someone/thing", "1.2.3", b64encode(hashlib.sha512(CONTENT).digest()).decode(), {})


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry that has what `answers` says, by path."""
    answers: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the base class's name
            content = answers.get(self.path)
            self.send_response(404 if content is None else 200)
            if content is not None:  # less than that is a download that breaks off
                self.send_header("Content-Length", str(max(len(content), len(CONTENT))))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("BIFOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(npm, "PACKAGES", (PACKAGE,))
    yield answers
    server.shutdown()
    server.server_close()


def test_addresses():
    assert TRANSFORMERS.tarball.startswith("huggingface-transformers-")
    assert ONNXRUNTIME.address("https://x.org/").startswith("https://x.org/onnxruntime-web/-/onnxruntime-web-1.")
    assert PACKAGE.address("https://x.org") == "https://x.org/@someone/thing/-/thing-1.2.3.tgz"


def test_downloaded_once(registry):
    path = "/@someone/thing/-/thing-1.2.3.tgz"
    with pytest.raises(PackageError, match=r"@someone/thing@1\.2\.3 cannot be downloaded .* Not Found.*npm pack @so"):
        load_tarballs()
    registry[path] = b"another tarball"
    with pytest.raises(PackageError, match="its hash differs"):
        load_tarballs()
    registry[path] = CONTENT[:4]
    with pytest.raises(PackageError, match=r"cannot be downloaded .*IncompleteRead.*npm pack @so"):
        load_tarballs()
    assert not default_cache().exists()
    registry[path] = CONTENT
    assert load_tarballs() == {PACKAGE: CONTENT}
    registry.clear()
    assert load_tarballs() == {PACKAGE: CONTENT}, "from the cache"
    cached = default_cache() / "npm" / "someone-thing-1.2.3.tgz"
    cached.write_bytes(b"half")
    with pytest.raises(PackageError, match="cannot be downloaded"):
        load_tarballs()
    registry[path] = CONTENT
    assert load_tarballs() == {PACKAGE: CONTENT}, "a damaged file in the cache is replaced"


def test_without_a_connection(registry, monkeypatch, tmp_path):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(PackageError, match="pass the folder with --npm-packages"):
        load_tarballs()
    with pytest.raises(PackageError, match=r"has no someone-thing-1\.2\.3\.tgz. Get it with: npm pack @someone"):
        load_tarballs(tmp_path)
    (tmp_path / PACKAGE.tarball).write_bytes(CONTENT)
    assert load_tarballs(tmp_path) == {PACKAGE: CONTENT}
    (tmp_path / PACKAGE.tarball).write_bytes(b"other")
    with pytest.raises(PackageError, match="is not @someone"):
        load_tarballs(tmp_path)
