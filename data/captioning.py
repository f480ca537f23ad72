"""Generate long captions for images with any image-text model of transformers."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from bifocal.data.image_errors import image_row_error
from bifocal.data.loading import iter_rows
from bifocal.data.schema import read_yaml, validated
from bifocal.data.skips import RowError, SkipLog, SkippedRow, start_log
from bifocal.data.source import Source
from bifocal.errors import DataError, first_line, looks_like_path
from bifocal.files import replace_file

_PART = 256  # rows per file; a killed run loses at most this many


class CaptionRecipe(BaseModel):
    """Settings of caption generation.

    Args:
        model, revision: an image-text model of transformers, by Hub id or folder.
        prompt: text that the model gets with each image.
        max_new_tokens, min_new_tokens: bounds for the length of a caption.
        batch_size: images per forward pass.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: str = ""
    revision: str | None = None
    prompt: str
    max_new_tokens: Annotated[int, Field(ge=1)] = 300
    min_new_tokens: Annotated[int, Field(ge=0)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 8


def caption_recipe(model: str, path: Path | None = None) -> CaptionRecipe:
    """Return the settings in a YAML file; without a file, the defaults of Bifocal.

    Raises:
        RecipeError: if the file cannot be read, is not valid YAML, or has a wrong key.
    """
    path = path or Path(__file__).parent / "recipes" / "caption.yaml"
    values = read_yaml(path)
    return validated(CaptionRecipe, {**values, "model": model}, [])


@dataclass
class CaptionCounts:
    """Numbers of images that were captioned in this run, that had a caption before, and that were skipped."""

    captioned: int = 0
    existing: int = 0
    skipped: int = 0


def caption_source(source: Source, out: Path, recipe: CaptionRecipe) -> CaptionCounts:
    """Write a greedily decoded caption for every image of a source; a killed run resumes.

    The folder is then a source itself (`path: OUT/*.parquet`): Parquet files with `image`, `caption`, `image_id`, and
    for each row the `model`, its `revision`, the `prompt` and the time of creation, `created_at`. Image files are named
    by their paths, other images are copied. Images that cannot be read are listed in skipped.jsonl.

    Raises:
        DataError: if there are no images or no such model, or the folder has captions by another model or prompt.
        OSError: if the folder cannot be written.
    """
    _require_model_path(recipe.model)
    source_rows = iter_rows(source, "image-only")
    first = list(islice(source_rows, 1))  # a source that cannot be read is reported before the model is loaded
    captioner = _Captioner(recipe)
    out.mkdir(parents=True, exist_ok=True)
    done, parts = _done(out, captioner.provenance)
    skipped = SkipLog(start_log(out / "skipped.jsonl"))
    result = CaptionCounts(existing=len(done))
    images = _images(chain(first, source_rows), done, skipped, result)
    while rows := list(islice(images, _PART)):
        captioned: list[dict[str, Any]] = []
        for start in range(0, len(rows), recipe.batch_size):
            batch = rows[start : start + recipe.batch_size]
            captions = captioner([image for _, _, image in batch])
            captioned += [
                {"row": name, **row, "caption": caption}
                for (name, row, _), caption in zip(batch, captions, strict=True)
            ]
        result.captioned += _write(captioned, out / f"part-{parts:05}.parquet", captioner.provenance, skipped, result)
        parts += 1
    if not result.captioned and not result.existing:
        raise DataError(f"'{source.title}' has no image that could be captioned. Check path and column_mapping.")
    return result


def _require_model_path(model: str) -> None:
    """Check that a model's local path exists and holds a model. A Hub id passes.

    Raises:
        DataError: if it does not.
    """
    path, problem = Path(model), None
    if path.is_file():
        problem = "it is a file"
    elif path.is_dir() and not (path / "config.json").exists():
        problem = "it has no config.json"
    elif not path.exists() and looks_like_path(model):
        problem = "it does not exist"
    if problem is not None:
        raise DataError(f"'{model}' is not an image-text model that transformers can load ({problem}).")


def _done(out: Path, provenance: dict[str, str]) -> tuple[set[str], int]:
    """Return the names of rows that have captions, and the first unused file number."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_schema, read_table

    done: set[str] = set()
    numbers = [-1]
    for path in sorted(out.glob("part-*.parquet")):
        columns = ["row", *provenance]
        try:
            ours = path.stem.partition("-")[2].isdigit() and set(columns) <= set(read_schema(path).names)
        except ArrowInvalid:
            ours = False
        if not ours:
            raise DataError(f"'{path}' was not written by this command. Choose another folder or move it away.")
        numbers.append(int(path.stem.partition("-")[2]))
        table = read_table(path, columns=columns)
        for name, value in provenance.items():
            other = next((kept for kept in table[name].unique().to_pylist() if kept != value), None)
            if other is not None:
                raise DataError(f"'{out}' holds captions by another {name} ('{other}'). Choose another folder.")
        done.update(table["row"].to_pylist())
    return done, max(numbers) + 1


def _images(
    rows: Iterator[tuple[str, dict[str, Any] | RowError]], done: set[str], skipped: SkipLog, result: CaptionCounts
) -> Iterator[tuple[str, dict[str, Any], Image.Image]]:
    """Yield name, row and image of each row that has no caption yet."""
    from bifocal.modeling import load_image

    for name, row in rows:
        if name in done:
            continue
        if not isinstance(row, RowError):
            try:
                image = load_image(row["image"])
                skipped.add("images", 1)
                yield name, row, image
                continue
            except Exception as error:
                row = image_row_error(error)
        skipped.add("images", 1, [SkippedRow.of(name, row)])
        result.skipped += 1


def _write(
    rows: list[dict[str, Any]], path: Path, provenance: dict[str, str], skipped: SkipLog, result: CaptionCounts
) -> int:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    kept = []
    for row in rows:
        if not row["caption"]:
            skipped.add("images", 0, [SkippedRow(row["row"], "empty caption")])
            result.skipped += 1
            continue
        image = row["image"]
        kind = "bytes" if isinstance(image, bytes) else "path"
        kept.append({**row, "image": {"bytes": None, "path": None, kind: image}, **provenance, "created_at": _now()})
    if not kept:
        return 0
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = [(name, pa.string()) for name in ("row", "image_id", "caption", *provenance, "created_at")]
    with replace_file(path) as scratch:
        write_table(pa.Table.from_pylist(kept, schema=pa.schema([("image", image_type), *texts])), scratch)
    return len(kept)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Captioner:
    """An image-text model with its processor."""

    def __init__(self, recipe: CaptionRecipe) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.recipe = recipe
        cuda = torch.cuda.is_available()
        self.device = "cuda" if cuda else "cpu"
        try:
            self.processor = AutoProcessor.from_pretrained(recipe.model, revision=recipe.revision)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                recipe.model, revision=recipe.revision, dtype="auto" if cuda else torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"'{recipe.model}' is not an image-text model that transformers can load ({first_line(error)})."
            ) from error
        self.model = model.to(self.device).eval()
        if getattr(self.processor, "tokenizer", None) is not None:
            self.processor.tokenizer.padding_side = "left"  # generated text follows the prompt
        self.provenance = {
            "model": recipe.model,
            "revision": _revision(recipe.model, self.model),
            "prompt": recipe.prompt,
        }

    def __call__(self, images: list[Image.Image]) -> list[str]:
        import torch

        with torch.inference_mode():
            return self._captions(images)

    def _captions(self, images: list[Image.Image]) -> list[str]:
        import torch

        prompt = self.recipe.prompt
        if getattr(self.processor, "chat_template", None):
            conversations = [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                for image in images
            ]
            inputs = self.processor.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                processor_kwargs={"padding": True},
            )  # fmt: skip
        else:
            inputs = self.processor(images=images, text=[prompt] * len(images), return_tensors="pt", padding=True)
        inputs = inputs.to(self.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self.model.dtype)
        recipe = self.recipe
        ids = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=recipe.max_new_tokens, min_new_tokens=recipe.min_new_tokens
        )
        prompt_ids = inputs.get("input_ids")
        if (
            prompt_ids is not None
            and ids.shape[1] > prompt_ids.shape[1]
            and torch.equal(ids[:, : prompt_ids.shape[1]], prompt_ids)
        ):
            ids = ids[:, prompt_ids.shape[1] :]  # decoder-only models repeat the prompt
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip().removeprefix(prompt).strip() for text in texts]


def _revision(name: str, model: Any) -> str:
    """Return the commit on the Hub; for a folder, a digest of its configuration and of the sizes of its weights."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(name).glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin"):
            content = path.read_bytes() if path.name == "config.json" else str(path.stat().st_size).encode()
            digest.update(path.name.encode() + content)
    return f"folder-{digest.hexdigest()}"
