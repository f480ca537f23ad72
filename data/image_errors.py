"""Why an image could not be read, as the error of its row. Imports nothing heavy."""

import re

from PIL import Image, UnidentifiedImageError

from bifocal.data.skips import RowError

_ADDRESS = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")  # in messages of Pillow; another one in each run


def image_row_error(error: BaseException) -> RowError:
    """Return the error of a row whose image could not be read."""
    message = _ADDRESS.sub("the bytes", str(error).removesuffix("; replace or remove it."))
    return RowError(_cause(error), message[:300])


def _cause(error: BaseException) -> str:
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, FileNotFoundError):
            return "missing image"
        if isinstance(inner, UnidentifiedImageError):
            return "not an image"
        if isinstance(inner, Image.DecompressionBombError | Image.DecompressionBombWarning):
            return "decompression bomb"
        inner = inner.__cause__
    return "broken image"
