"""The model that an index is made and searched with."""

import hashlib
from pathlib import Path

from bifocal.errors import first_line
from bifocal.hub.search.items import SearchError
from bifocal.modeling import BifocalModel


def load_model(model: str) -> BifocalModel:
    """Return a Bifocal model with its processor. No code of its repository is run.

    Args:
        model: a folder or Hub id.

    Raises:
        SearchError: if there is no such model.
    """
    path = Path(model).expanduser()
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1):
        raise SearchError(f"There is no Bifocal model at '{model}' (no such folder). Pass --model with its local path.")
    try:
        loaded = BifocalModel.from_pretrained(path if path.exists() else model).eval()
        _ = loaded.processor
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds
        raise SearchError(f"There is no Bifocal model at '{model}' ({first_line(error)}).") from error
    return loaded


def weights_hash(model: str | Path) -> str:
    """Return a short hash of a model's weights: equal for equal files, whatever the folder is called.

    Args:
        model: a folder or Hub id.

    Raises:
        SearchError: if there are no weights.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            raise SearchError(f"There is no model at '{model}', here or on the Hub ({first_line(error)}).") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SearchError(f"'{model}' has no safetensors. Pass the folder or Hub id of a Bifocal model.")
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()
