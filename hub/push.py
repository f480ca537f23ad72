"""Publishes a model's folder or a Space on the Hub with huggingface_hub."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifocal.errors import BifocalError
from bifocal.files import MARKER

_SPACES = {"gradio": "app.py", "static": "index.html"}  # what a Space of each kind starts with
_NEEDED = ("config.json", "README.md")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Tokens of the Hub and of other services, private keys; a folder that holds one is not uploaded.
# A token starts a word or follows an escape (\n, %3D): in names such as dusk-over-the-harbour.jpg it does neither.
_SECRET = re.compile(
    rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=%[0-9A-Fa-f]{2}))"
    rb"(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[0-9A-Z]{16})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_LARGEST_SEARCHED = 5 * 2**20  # bytes of the largest file that is searched for secrets; weights are larger


class PushError(BifocalError):
    """A folder that cannot be published, or an upload that failed."""


@dataclass
class Upload:
    """The content of an upload.

    Args:
        files: size in bytes by path in the repository.
        space_sdk: "gradio" or "static" if the folder is a Space; None for a model.
        repo_id_on_card: repository that the card's code loads; None without such code.
    """

    files: dict[str, int]
    space_sdk: str | None = None
    repo_id_on_card: str | None = None

    def text(self) -> str:
        """Return the files and their sizes as lines."""
        width = max(map(len, self.files))
        lines = [f"  {name:<{width}}  {size:>13,} bytes" for name, size in self.files.items()]
        return "\n".join([*lines, f"  {'total':<{width}}  {sum(self.files.values()):>13,} bytes"])


def validate_folder(folder: Path) -> Upload:
    """Check a folder for files that should not be published, and return what it would upload.

    Raises:
        PushError: if the folder holds no model, a pickle, a link to the outside or what looks like a secret; the
            message names the file.
    """
    if not folder.is_dir():
        raise PushError(f"The folder '{folder}' does not exist. Export a model first.")
    sdk = _front_matter(folder).get("sdk")
    is_space = sdk in _SPACES and (folder / _SPACES[sdk]).exists()
    missing = next((name for name in _NEEDED if not (folder / name).exists()), None)
    if not is_space and (missing is not None or not list(folder.glob("*.safetensors"))):
        raise PushError(
            f"'{folder}' is not an exported model (it has no {missing or '*.safetensors'}). Export it first."
        )
    files: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(".cache/") or path.name == MARKER:
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise PushError(f"'{name}' is a link to a file outside the folder. Replace it by the file.")
        if path.suffix in _PICKLES:
            raise PushError(f"'{name}' is a pickle, which can run code when it is read. Save weights as safetensors.")
        if path.stat().st_size <= _LARGEST_SEARCHED and _SECRET.search(path.read_bytes()):
            raise PushError(f"'{name}' holds what looks like a secret (a token or a private key). Remove it.")
        files[name] = path.stat().st_size
    card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    repo_id = re.search(r'AutoModel\.from_pretrained\("([^"]+)"', card)
    return Upload(files, sdk if is_space else None, repo_id[1] if repo_id else None)


def _front_matter(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    return (metadata_load(folder / "README.md") or {}) if (folder / "README.md").exists() else {}


def push(
    folder: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    may_overwrite: Callable[[str], bool] = lambda repo_id: False,
    token: str | None = None,
) -> str:
    """Upload a folder and return the address of the commit or pull request.

    After a lost connection, files that have arrived are not sent again.

    Args:
        folder: folder of an exported model or a Space.
        repo_id: "organisation/name" of the repository.
        private: whether a new repository is private.
        revision: branch, created if it does not exist; the main branch when None.
        create_pr: open a pull request instead of a commit.
        may_overwrite: returns whether files of the repository may be overwritten; called if it has some.
        token: access token; that of `hf auth login` when None.

    Raises:
        PushError: if `validate_folder` refuses the folder, the repository may not be overwritten, the token is refused
            or there is no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    space_sdk = validate_folder(folder).space_sdk
    repo_type = "model" if space_sdk is None else "space"
    api = HfApi(token=token)
    try:
        if api.repo_exists(repo_id, repo_type=repo_type):
            files = [name for name in api.list_repo_files(repo_id, repo_type=repo_type) if name != ".gitattributes"]
            if files and not create_pr and not may_overwrite(repo_id):
                raise PushError(
                    f"'{repo_id}' has {len(files)} files already. Choose another name, or overwrite them with --yes."
                )
        else:
            api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=space_sdk)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
        commit = api.upload_folder(
            repo_id=repo_id, repo_type=repo_type, folder_path=folder, revision=revision, create_pr=create_pr or None,
            commit_message=f"Upload a Bifocal {repo_type}", ignore_patterns=[MARKER, f"*/{MARKER}"],
        )  # fmt: skip
    except PushError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise PushError(_status_message(status, repo_id)) from error
    except HFValidationError as error:
        raise PushError(f"'{repo_id}' is not the name of a repository. Write organisation/name.") from error
    except Exception as error:
        if not _is_connection(error):
            raise
        raise PushError(
            f"The connection to the Hub was lost ({type(error).__name__}). Push again; files that arrived are not sent "
            "again."
        ) from error
    return str(commit.pr_url or commit.commit_url)


def _is_connection(error: BaseException | None) -> bool:
    """Return whether a lost connection caused an error; huggingface_hub wraps the errors of its HTTP library."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _status_message(status: int | None, repo_id: str) -> str:
    if status in (401, 403):
        return f"You may not write to '{repo_id}' ({status}). Log in with a token that may: hf auth login."
    if status == 404:
        return f"'{repo_id}' does not exist on the Hub, or you may not see it (404). Check the name and the token."
    return f"The Hub refused the upload to '{repo_id}' ({status}). Try again later."
