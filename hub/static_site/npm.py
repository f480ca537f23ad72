"""The two packages of npm that a static site contains, from a folder, the cache or npm's registry."""

import base64
import hashlib
import http.client
import io
import os
import shutil
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bifocal.errors import BifocalError, first_line
from bifocal.files import default_cache, replace_file

_REGISTRY = "https://registry.npmjs.org"
_TIMEOUT = 60.0  # seconds for the registry to answer
LIBRARIES = "lib"  # folder of a site


class PackageError(BifocalError):
    """A package of npm that cannot be had, or is not the one that is expected."""


@dataclass(frozen=True, eq=False)
class NpmPackage:
    """A release of a package.

    Args:
        name: name in the registry.
        version: its release.
        sha512: hash of its tarball in base64, as the registry has it (`npm view NAME@VERSION dist.integrity`).
        files: names in the site by their paths in the tarball.
    """

    name: str
    version: str
    sha512: str
    files: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """Name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def address(self, registry: str) -> str:
        """Return where a registry has the tarball."""
        return f"{registry.rstrip('/')}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"

    def has_hash(self, tarball: bytes) -> bool:
        return base64.b64encode(hashlib.sha512(tarball).digest()).decode() == self.sha512


_ORT = "ort.wasm.bundle.min.mjs"
# The build for the processor alone: half the size of those with WebGPU, which transformers.js brings itself.
ONNXRUNTIME = NpmPackage(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    {f"package/dist/{name}": name for name in (_ORT, "ort-wasm-simd-threaded.wasm")},
)
TRANSFORMERS = NpmPackage(
    "@huggingface/transformers",
    "4.3.1",
    "5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/pWBJhA==",
    {
        "package/dist/transformers.web.min.js": "transformers.web.min.js",
        "package/LICENSE": "transformers-LICENSE.txt",
    },
)
PACKAGES = (ONNXRUNTIME, TRANSFORMERS)
# Browsers resolve no package names; import maps, which would, do not count in workers.
_RENAMED_IMPORTS = ('from"onnxruntime-common"', 'from"onnxruntime-web/webgpu"')
_NOTICE = f"""The scripts in this folder are those of two packages of npm:

{ONNXRUNTIME}, MIT licence, as below.
{TRANSFORMERS}, Apache licence 2.0, as in transformers-LICENSE.txt. Two imports in transformers.web.min.js were changed
from the name of onnxruntime-web to its file in this folder.

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def require_tarballs(folder: Path | None) -> None:
    """Check that a folder has all tarballs; None stands for the registry.

    Raises:
        PackageError: if one is missing.
    """
    missing = None if folder is None else next((p for p in PACKAGES if not (folder / p.tarball).is_file()), None)
    if missing is not None:
        raise PackageError(f"'{folder}' has no {missing.tarball}. Get it with: npm pack {missing}")


def load_tarballs(folder: Path | None = None) -> dict[NpmPackage, bytes]:
    """Return the tarballs of all packages, checked by their hashes.

    Args:
        folder: folder with tarballs of `npm pack`. If None, Bifocal's cache, which is filled from npm's registry.

    Raises:
        PackageError: if one is missing in the folder, is another release, or cannot be downloaded.
    """
    require_tarballs(folder)
    return {package: _load(package, folder) for package in PACKAGES}


def write_libraries(tarballs: Mapping[NpmPackage, bytes], site: Path) -> None:
    """Write the files of the packages that a site needs into its folder `lib`."""
    folder = site / LIBRARIES
    folder.mkdir()
    for package, tarball in tarballs.items():
        for name, content in _read_files(package, tarball):
            (folder / name).write_bytes(content)
    (folder / "LICENSES.txt").write_text(_NOTICE, encoding="utf-8")


def _load(package: NpmPackage, folder: Path | None) -> bytes:
    path = (default_cache() / "npm" if folder is None else folder) / package.tarball
    if path.is_file() and package.has_hash(tarball := path.read_bytes()):
        return tarball
    if folder is not None:
        raise PackageError(f"'{path}' is not {package} as npm has it. Get it again with: npm pack {package}")
    tarball = _download(package)
    with replace_file(path) as scratch:
        scratch.write_bytes(tarball)
    return tarball


def _download(package: NpmPackage) -> bytes:
    address = package.address(_registry())
    remedy = f"Run npm pack {' '.join(map(str, PACKAGES))} elsewhere, and pass the folder with --npm-packages."
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            tarball: bytes = answer.read()
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
    ) as error:  # no connection, a status, half a file, no address
        raise PackageError(f"{package} cannot be downloaded from {address} ({first_line(error)}). {remedy}") from error
    if not package.has_hash(tarball):
        raise PackageError(f"{address} is not {package} as npm has it: its hash differs. {remedy}")
    return tarball


def _registry() -> str:
    """Return the registry that npm is configured for, if npm is here; npm's own otherwise."""
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if os.environ.get(name):
            return os.environ[name]
    npm = shutil.which("npm")
    if npm is None:
        return _REGISTRY
    done = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True, check=False)
    address = done.stdout.strip()
    return address if address.startswith("http") else _REGISTRY


def _read_files(package: NpmPackage, tarball: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name in the site and the content of each file that is needed."""
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as archive:
        for member in archive:
            name = package.files.get(member.name)
            file = archive.extractfile(member) if name is not None else None
            if name is None or file is None:
                continue
            content = file.read()
            if name.startswith("transformers.web"):
                for line in _RENAMED_IMPORTS:
                    content = content.replace(line.encode(), f'from"./{_ORT}"'.encode())
            yield name, content
