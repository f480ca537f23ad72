"""Long captions for one's own pictures, by any image-text model of transformers."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from bifocal.data.images import fault_of
from bifocal.data.inspection import rows_of
from bifocal.data.schema import read_yaml, validated
from bifocal.data.skips import Fault, Skip, Skipped, start_log
from bifocal.data.source import Source
from bifocal.errors import DataError, first_line
from bifocal.files import replace_file
from bifocal.modeling import load_image

_PART = 256  # rows of a file; at most so many are lost when a run is killed


class CaptionRecipe(BaseModel):
    """
    Args:
        model, revision: an image-text model of transformers, by Hub id or folder.
        prompt: what it is asked.
        max_new_tokens, min_new_tokens: of a caption.
        batch_size: pictures at once.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: str = ""
    revision: str | None = None
    prompt: str
    max_new_tokens: Annotated[int, Field(ge=1)] = 300
    min_new_tokens: Annotated[int, Field(ge=0)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 8


def caption_recipe(model: str, path: Path | None = None) -> CaptionRecipe:
    """The settings in a file, or those that come with Bifocal.

    Raises:
        DataError: if there is no such file, it is no YAML, or a key in it is wrong.
    """
    path = path or Path(__file__).parent / "recipes" / "caption.yaml"
    values = read_yaml(path)
    return validated(CaptionRecipe, {**values, "model": model}, [])


@dataclass
class Captioned:
    """How many pictures were captioned now, how many before, and how many could not be read."""

    made: int = 0
    before: int = 0
    skipped: int = 0


def caption_source(source: Source, out: Path, recipe: CaptionRecipe) -> Captioned:
    """Write a caption for every picture of a source, greedily decoded; go on where a run was killed.

    The folder then is a source itself (`path: OUT/*.parquet`): Parquet files with `image`, `caption`, `image_id`, and
    for each row the `model`, its `revision`, the `prompt` and when it was `made`. Pictures of files are named by their
    paths, others are copied. What cannot be read is named in skipped.jsonl.

    Raises:
        DataError: no pictures, no such model, or a folder with captions of another model or prompt.
        OSError: the folder cannot be written.
    """
    captioner = _Captioner(recipe)
    out.mkdir(parents=True, exist_ok=True)
    done, parts = _done(out, captioner.provenance)
    skipped = Skipped(start_log(out / "skipped.jsonl"))
    result = Captioned(before=len(done))
    pictures = _pictures(source, done, skipped, result)
    while rows := list(islice(pictures, _PART)):
        captioned: list[dict[str, Any]] = []
        for start in range(0, len(rows), recipe.batch_size):
            batch = rows[start : start + recipe.batch_size]
            captions = captioner([picture for _, _, picture in batch])
            captioned += [
                {"row": name, **row, "caption": caption}
                for (name, row, _), caption in zip(batch, captions, strict=True)
            ]
        result.made += _write(captioned, out / f"part-{parts:05}.parquet", captioner.provenance, skipped, result)
        parts += 1
    if not result.made and not result.before:
        raise DataError(f"'{source.title}' has no picture that could be captioned; look at its path and columns.")
    return result


def _done(out: Path, provenance: dict[str, str]) -> tuple[set[str], int]:
    """Names of the rows that have captions, and the first number that no file has."""
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
            raise DataError(f"'{path}' holds no captions by this command; choose another folder or move it away.")
        numbers.append(int(path.stem.partition("-")[2]))
        table = read_table(path, columns=columns)
        for name, value in provenance.items():
            other = next((found for found in table[name].unique().to_pylist() if found != value), None)
            if other is not None:
                raise DataError(f"'{out}' holds captions by another {name} ('{other}'); choose another folder.")
        done.update(table["row"].to_pylist())
    return done, max(numbers) + 1


def _pictures(
    source: Source, done: set[str], skipped: Skipped, result: Captioned
) -> Iterator[tuple[str, dict[str, Any], Image.Image]]:
    """(name, row, picture) of what has no caption yet."""
    for name, row in rows_of(source, "image-only"):
        if name in done:
            continue
        if not isinstance(row, Fault):
            try:
                picture = load_image(row["image"])
                skipped.add("pictures", 1)
                yield name, row, picture
                continue
            except Exception as error:
                row = fault_of(error)
        skipped.add("pictures", 1, [Skip.of(name, row)])
        result.skipped += 1


def _write(
    rows: list[dict[str, Any]], path: Path, provenance: dict[str, str], skipped: Skipped, result: Captioned
) -> int:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    kept = []
    for row in rows:
        if not row["caption"]:
            skipped.add("pictures", 0, [Skip(row["row"], "empty caption")])
            result.skipped += 1
            continue
        image = row["image"]
        kind = "bytes" if isinstance(image, bytes) else "path"
        kept.append({**row, "image": {"bytes": None, "path": None, kind: image}, **provenance, "made": _now()})
    if not kept:
        return 0
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = [(name, pa.string()) for name in ("row", "image_id", "caption", *provenance, "made")]
    with replace_file(path) as scratch:
        write_table(pa.Table.from_pylist(kept, schema=pa.schema([("image", image_type), *texts])), scratch)
    return len(kept)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Captioner:
    """An image-text model with its processor."""

    def __init__(self, recipe: CaptionRecipe) -> None:
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
                f"'{recipe.model}' is no image-text model that transformers can load ({first_line(error)})."
            ) from error
        self.model = model.to(self.device).eval()
        if getattr(self.processor, "tokenizer", None) is not None:
            self.processor.tokenizer.padding_side = "left"  # what is generated follows the prompt
        self.provenance = {
            "model": recipe.model,
            "revision": _revision(recipe.model, self.model),
            "prompt": recipe.prompt,
        }

    @torch.inference_mode()
    def __call__(self, pictures: list[Image.Image]) -> list[str]:
        prompt = self.recipe.prompt
        if getattr(self.processor, "chat_template", None):
            talks = [
                [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
                for picture in pictures
            ]
            inputs = self.processor.apply_chat_template(
                talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                processor_kwargs={"padding": True},
            )  # fmt: skip
        else:
            inputs = self.processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt", padding=True)
        inputs = inputs.to(self.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self.model.dtype)
        recipe = self.recipe
        ids = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=recipe.max_new_tokens, min_new_tokens=recipe.min_new_tokens
        )
        asked = inputs.get("input_ids")
        if asked is not None and ids.shape[1] > asked.shape[1] and torch.equal(ids[:, : asked.shape[1]], asked):
            ids = ids[:, asked.shape[1] :]  # decoder-only models repeat what they were asked
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip().removeprefix(prompt).strip() for text in texts]


def _revision(name: str, model: Any) -> str:
    """The commit on the Hub; of a folder, a digest of its configuration and of the sizes and times of its weights."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(name).glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin"):
            content = path.read_bytes() if path.name == "config.json" else str(path.stat().st_size).encode()
            digest.update(path.name.encode() + content)
    return f"folder-{digest.hexdigest()}"
