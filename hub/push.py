"""Publishing a model's folder on the Hub, through huggingface_hub."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifocal.errors import BifocalError
from bifocal.files import MARKER

_NEEDED = ("config.json", "README.md")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Tokens of the Hub and of others, private keys; a folder that holds one is not uploaded.
_SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----")
_SEARCHED = 5 * 2**20  # bytes of a file in which secrets are looked for; weights are larger and hold none


class PushError(BifocalError):
    """What cannot be published, in one sentence."""


@dataclass
class Upload:
    """What will be uploaded.

    Args:
        files: size in bytes by path in the repository.
        space: a Gradio Space and no model.
        called: the name that the card's code loads, None without such code.
    """

    files: dict[str, int]
    space: bool = False
    called: str | None = None

    def text(self) -> str:
        width = max(map(len, self.files))
        lines = [f"  {name:<{width}}  {size:>13,} bytes" for name, size in self.files.items()]
        return "\n".join([*lines, f"  {'in all':<{width}}  {sum(self.files.values()):>13,} bytes"])


def look(folder: Path) -> Upload:
    """What a folder would upload, after a look at what should not be there.

    Raises:
        PushError: no model, a pickle, or something that looks like a secret; with the file's name.
    """
    if not folder.is_dir():
        raise PushError(f"There is no folder '{folder}'; export a model first.")
    space = (folder / "app.py").exists() and _front_matter(folder).get("sdk") == "gradio"
    missing = next((name for name in _NEEDED if not (folder / name).exists()), None)
    if not space and (missing is not None or not list(folder.glob("*.safetensors"))):
        raise PushError(f"'{folder}' is no exported model (it has no {missing or '*.safetensors'}); export it first.")
    files: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(".cache/") or path.name == MARKER:
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise PushError(f"'{name}' is a link out of the folder; replace it by the file.")
        if path.suffix in _PICKLES:
            raise PushError(f"'{name}' is a pickle, which can run code where it is read; keep weights as safetensors.")
        if path.stat().st_size <= _SEARCHED and _SECRET.search(path.read_bytes()):
            raise PushError(f"'{name}' holds what looks like a secret (a token or a private key); remove it.")
        files[name] = path.stat().st_size
    card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    called = re.search(r'AutoModel\.from_pretrained\("([^"]+)"', card)
    return Upload(files, space, called[1] if called else None)


def _front_matter(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    return (metadata_load(folder / "README.md") or {}) if (folder / "README.md").exists() else {}


def push(
    folder: Path,
    repository: str,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    may_overwrite: Callable[[str], bool] = lambda repository: False,
    token: str | None = None,
) -> str:
    """Upload a folder; what arrived before a connection was lost is not sent again.

    Args:
        repository: "organisation/name".
        private: of a repository that is made now.
        revision: a branch, made if there is none; the main one when None.
        pull_request: propose the change instead of making it.
        may_overwrite: asked when the repository has files already.
        token: the one that `hf auth login` keeps when None.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        PushError: see `look`; a repository that may not be overwritten, a token that is refused, or no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    kind = "space" if look(folder).space else "model"
    api = HfApi(token=token)
    try:
        if api.repo_exists(repository, repo_type=kind):
            there = [name for name in api.list_repo_files(repository, repo_type=kind) if name != ".gitattributes"]
            if there and not pull_request and not may_overwrite(repository):
                raise PushError(
                    f"'{repository}' has {len(there)} files already; choose another name, or say that they may be "
                    "replaced (--yes)."
                )
        else:
            api.create_repo(
                repository, private=private, exist_ok=True, repo_type=kind,
                space_sdk="gradio" if kind == "space" else None,
            )  # fmt: skip
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True, repo_type=kind)
        done = api.upload_folder(
            repo_id=repository, repo_type=kind, folder_path=folder, revision=revision, create_pr=pull_request or None,
            commit_message=f"Upload a Bifocal {kind}", ignore_patterns=[MARKER, f"*/{MARKER}"],
        )  # fmt: skip
    except PushError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise PushError(_said(status, repository)) from error
    except HFValidationError as error:
        raise PushError(f"'{repository}' is no name of a repository; it is organisation/name.") from error
    except Exception as error:
        if not _is_connection(error):
            raise
        raise PushError(
            f"The connection to the Hub was lost ({type(error).__name__}); push again, what arrived is not sent again."
        ) from error
    return str(done.pr_url or done.commit_url)


def _is_connection(error: BaseException | None) -> bool:
    """Whether a lost connection is behind an error; huggingface_hub wraps those of its HTTP library."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _said(status: int | None, repository: str) -> str:
    if status in (401, 403):
        return (
            f"The Hub does not let you write to '{repository}' ({status}); log in with a token that may: hf auth login."
        )
    if status == 404:
        return f"The Hub knows no such place as '{repository}', or hides it from you (404); look at the name and token."
    return f"The Hub refused the upload to '{repository}' ({status}); try again later."
