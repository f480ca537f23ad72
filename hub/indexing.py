"""Indexing a source: its items are read, embedded and written to a search index."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bifocal.data.image_files import printable
from bifocal.data.source import Source
from bifocal.hub.item_reader import IMAGE_KINDS, ItemReader, infer_kind
from bifocal.hub.search.arguments import require_model_path
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.settings import SETTINGS, Variant
from bifocal.hub.search.sync import AddResult


@dataclass
class IndexSummary:
    """What a run over a source did.

    Args:
        result: what changed in the index.
        skipped: name and reason of each row and file that could not be read.
        ignored: files that were not read as images, counted in words.
        images_without_row: images that the source's table does not name, indexed without a caption.
        counts: number of images, captions and texts in the index.
        missing_sources: local paths that were indexed and do not exist any more.
        complete: whether the whole source was read; if not, it is unknown which items are missing.
        approximate: what those who search an approximate variant should know, by variant.
    """

    result: AddResult
    skipped: list[tuple[str, str]]
    ignored: list[str]
    images_without_row: int
    counts: dict[str, int]
    missing_sources: list[str]
    complete: bool
    approximate: dict[Variant, str]


def index_source(
    source: Source, folder: Path, model: str | None = None, kind: str | None = None, captions: bool | None = None,
    prune: bool = False, dims: Sequence[int] = (), precisions: Sequence[str] = (), batch_size: int = 32,
    progress: Callable[[int], None] = lambda count: None, dtype: str | None = None, num_workers: int | None = None,
    fast_decoding: bool | None = None, approximate: bool = False,
) -> IndexSummary:  # fmt: skip
    """Embed the items of a source into an index, and update what the index has of this source.

    A new index into which nothing was written is deleted again.

    Args:
        source: source to read.
        folder: folder of the index, new or existing.
        model: folder or Hub id of a dual encoder, or for texts of a sentence-transformers model; that of the index if
            None.
        kind: kind of the rows; inferred from files and columns if None.
        captions: whether captions are items as well; as in the last run over this source if None.
        prune: delete from the index what the source no longer has.
        dims, precisions, approximate: variants of the index, see `SearchIndex.create`.
        batch_size: texts or images per forward pass.
        progress: called with the number of items read.
        dtype: dtype to embed in, one of `DTYPE_CHOICES`. An index is made in one dtype; when None or "auto", items are
            added in the one that it has, and those of a new index are embedded in the dtype of the model's weights, or
            by "auto" in bfloat16 where the device multiplies in it.
        num_workers: threads that decode and resize images ahead of the model; see `encode_image` of a model.
        fast_decoding: whether large JPEGs are decoded at reduced scale; see `SearchIndex.create`.

    Raises:
        DataError: if the source cannot be read.
        SearchError: if there is no model, it does not embed what the source holds, or the index is damaged, of
            another model or made in another dtype or decoding.
    """
    kind = infer_kind(source, kind)
    existed = (folder / SETTINGS).exists()
    existing = SearchIndex(folder) if existed else None
    model = model or (existing.model if existing is not None else None)
    if model is None:
        raise SearchError("Pass --model with the folder or Hub id of a model (Bifocal, CLIP, SigLIP, ...).")
    require_model_path(model)
    SearchIndex.check(folder, precisions)
    if existing is not None:
        SearchIndex.check_dims(dims, existing.dimensions)
        if existing.parts:
            if dtype in (None, "auto"):
                dtype = existing.dtype
            elif existing.has_rows():
                existing.require_same_dtype(dtype)
            if existing.has_rows():
                existing.require_decoding(fast_decoding)

    # Not before all of this is checked: it imports torch.
    from bifocal.embedding.models import load_model, weights_hash
    from bifocal.hub.search.searcher import Searcher

    loaded = load_model(model, dtype)
    if kind in IMAGE_KINDS:
        loaded.require_images()
    if fast_decoding and loaded.image_preparer(True).smallest_side is None:
        raise SearchError(f"Images for '{model}' can only be decoded at full size. Omit --fast-decoding.")
    index = SearchIndex.create(
        folder, model, weights_hash(model), loaded.dimensions, dims, precisions, loaded.prompts, loaded.dtype,
        fast_decoding, approximate,
    )  # fmt: skip
    reader = ItemReader(source, kind, captions or False, (folder,))
    if captions is None:
        reader.restore_options(index)
    try:
        searcher = Searcher(index, loaded)
        result = searcher.add(reader.items(), batch_size, progress, reader.item_source, prune, num_workers)
    finally:
        if not existed:
            index.discard_if_empty()
    is_new_and_empty = not existed and not (folder / SETTINGS).exists()
    return IndexSummary(
        result=result,
        skipped=reader.skipped + result.skipped,
        ignored=reader.ignored_files(),
        images_without_row=reader.images_without_row,
        counts={} if is_new_and_empty else index.counts(),
        missing_sources=[printable(path) for path in index.missing_sources()],
        complete=reader.item_source.complete,
        approximate={} if is_new_and_empty else {one: index.describe(one) for one in index.variants if one.approximate},
    )
