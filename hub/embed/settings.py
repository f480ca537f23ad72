"""How a run of `bifocal embed` embeds. Parts carry these settings, so that no run adds vectors of another kind."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from bifocal.hub.embed.arguments import EmbedError, require_precision

FORMAT = 1


@dataclass(frozen=True)
class RunSettings:
    """What decides the rows of a run. Everything in it is plain JSON.

    Args:
        source: the source as the user gave it: path, column mapping and so on.
        kind: kind of its rows.
        captions: whether captions of images are rows as well.
        model: folder or Hub id of the model.
        weights: hash of its weights, see `weights_hash`.
        dimensions: length of the vectors: the leading dimensions of the model's.
        precision: "float32", "float16" or "int8" (127 times the unit vector, rounded).
        dtype: dtype of the model's weights while it embeds; see `EmbeddingModel`.
        role, prompt: how texts are embedded; see `EmbedSettings`.
        query_prompt: text that goes before queries when the table is searched.
        fast_decoding: see `EmbedSettings`.
        thumbnails: whether rows hold thumbnails.
        rows_per_part: rows of the source per part.
        model_dimensions: length of the model's vectors.
        format: version of the table.
    """

    source: dict[str, Any]
    kind: str
    captions: bool
    model: str
    weights: str
    dimensions: int
    precision: str = "float32"
    dtype: str = "model"
    role: str = "document"
    prompt: str = ""
    query_prompt: str = ""
    fast_decoding: bool = False
    thumbnails: bool = True
    rows_per_part: int = 4096
    model_dimensions: int = 0
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_precision(self.precision)
        if self.rows_per_part < 1:
            raise EmbedError(f"--rows-per-part must be at least 1, not {self.rows_per_part}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require_same(self, recorded: Mapping[str, Any], address: str) -> None:
        """Check that what is there was written with these settings.

        The model may have moved: its weights count, not its path.

        Raises:
            EmbedError: if a setting differs.
        """
        own = self.to_dict()
        for one in fields(self):
            if one.name != "model" and recorded.get(one.name) != own[one.name]:
                difference = _difference(one.name, recorded.get(one.name), own)
                raise EmbedError(
                    f"'{address}' was written with other settings ({difference}). Use the same, or choose another "
                    "address."
                )


def _difference(name: str, recorded: Any, own: Mapping[str, Any]) -> str:
    """Return in words how a setting differs; of a source, its first key that does."""
    value = own[name]
    if isinstance(recorded, dict) and isinstance(value, dict):
        key = next(key for key in [*value, *recorded] if recorded.get(key) != value.get(key))
        name, recorded, value = f"{name}.{key}", recorded.get(key), value.get(key)
    return f"{name.replace('_', ' ')}: {recorded}, not {value}"


@dataclass(frozen=True)
class Speed:
    """How fast a run embeds, which changes no vector beyond float32's precision.

    Args:
        batch_size: texts or images per forward pass.
        num_workers: threads that decode images; see `EmbedSettings`.
    """

    batch_size: int = 32
    num_workers: int | None = None


@dataclass
class PartRecord:
    """What a part says about itself.

    Args:
        rows_read: rows of the source that it stands for, skipped ones included.
        digest: digest of their names and texts, which shows whether the source is still the same.
        is_last: whether the split ends with it.
        skipped: name and reason of each row that could not be embedded.
        files: path, bytes and modification time of the local files of the split; with the last part only.
        split: the split that the part is of.
        is_cut: whether a file was missing or was not read to its end; the part is written again by the next run.
        rows: rows that were embedded.
    """

    rows_read: int
    digest: str
    is_last: bool
    skipped: list[tuple[str, str]] = field(default_factory=list)
    files: list[list[Any]] = field(default_factory=list)
    split: str = ""
    is_cut: bool = False
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PartRecord":
        return cls(**{**values, "skipped": [(name, reason) for name, reason in values["skipped"]]})
