"""The commands `index`, `search`, `remove`, `database` and `serve`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bifocal.cli.console import require, writes_into
from bifocal.cli.data import Overrides
from bifocal.errors import BifocalError

if TYPE_CHECKING:
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.mirror import Added

Index = Annotated[Path, typer.Argument(help="Folder of an index.")]
Model = Annotated[str | None, typer.Option(help="Where the index's model is now, if it was moved.")]
_NEEDS = ("datasets", "faiss", "filelock")


def index(
    source: Annotated[str, typer.Argument(help="A folder of pictures, a file of rows, a pattern or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder of the index; what is there already is added to.")],
    model: Annotated[
        str | None, typer.Option(help="A Bifocal folder or Hub id; that of the index if there is one.")
    ] = None,
    overrides: Overrides = None,
    kind: Annotated[
        str | None, typer.Option(help="image-text, image-only, text-pair (its positives) or text-only.")
    ] = None,
    captions: Annotated[
        bool | None,
        typer.Option(
            "--captions/--no-captions", help="Also index the captions of images as texts; as the last time if omitted."
        ),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete from the index what this source no longer has.")
    ] = False,
    dims: Annotated[
        list[int] | None, typer.Option(help="Also search by so many leading dimensions; several times.")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="float32, int8; several times.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images per forward pass.")] = 32,
) -> None:
    """Embed images and texts for search. Run it again to resume, or to bring the index up to date with its source."""
    require(*_NEEDS, "pydantic")
    from tqdm import tqdm

    from bifocal.data.image_files import printable
    from bifocal.data.source import source_of
    from bifocal.hub.indexing import Reading, kind_of
    from bifocal.hub.search.index import SearchIndex, weights_of
    from bifocal.hub.search.searcher import Searcher, load_model

    writes_into(out, "free space and run the command again; it resumes")
    given = source_of(source, overrides)
    rows = kind_of(given, kind)
    there = SearchIndex(out) if (out / "index.json").exists() else None
    place = model or (there.model if there is not None else None)
    if place is None:
        raise BifocalError("Name the model that embeds, a Bifocal folder or Hub id, with --model.")
    dimensions = load_model(place).config.projection_dim
    made = SearchIndex.create(out, place, weights_of(place), dimensions, dims or [], precision or ["float32"])
    reading = Reading(given, rows, captions or False, (out,))
    if captions is None:
        reading.remember(made)
    try:
        with tqdm(desc="Looking at items", unit="", leave=False) as bar:
            done = Searcher(made, place).add(
                reading.items(), batch_size, lambda number: bar.update(number - bar.n), reading.origin, prune
            )
    finally:
        if there is None:
            made.discard_if_empty()
    source, shown = printable(source), printable(str(out))
    faults = reading.faults + done.failed
    for name, reason in faults[:5]:
        typer.echo(f"Left out: {name}: {reason}", err=True)
    if len(faults) > 5:
        typer.echo(f"... and {len(faults) - 5} more.", err=True)
    for passed in reading.left_out():
        typer.echo(f"Left out: {passed}.", err=True)
    if not done.count + done.known + done.duplicates:
        raise BifocalError(f"Nothing in '{source}' could be indexed.")
    typer.echo(_added(done, len(faults), reading.unnamed, made, shown))
    if done.restored:
        typer.echo(
            f"{done.restored} parts of the table were missing; if other sources were in them, index those again."
        )
    if done.gone and not prune:
        typer.echo(f"{done.gone:,} items of '{source}' in the index are no longer there; --prune deletes them.")
    for path in made.lost_sources():
        path = printable(path)
        typer.echo(
            f"'{path}' was indexed and is not there now; bifocal remove {shown} --source PATH deletes its items."
        )
    if not reading.origin.complete:
        typer.echo(f"Not all of '{source}' was read, so what is no longer there was not looked for.")


def _added(done: "Added", faults: int, unnamed: int, made: "SearchIndex", out: str) -> str:
    """The summary of a run of `bifocal index`."""
    counted = [
        (done.duplicates, "duplicates kept as further names"), (done.updated, "captions updated"),
        (done.renamed, "renamed"), (done.replaced, "replaced"), (done.pruned, "pruned"), (faults, "left out"),
        (unnamed, "images without a row in the table, indexed without a caption"),
    ]  # fmt: skip
    parts = [f"{count:,} {what}" for count, what in counted if count]
    counts = made.counts()
    return (
        f"{', '.join([f'{done.count:,} new', f'{done.known:,} known before', *parts])}; {out} has "
        f"{counts['image']:,} pictures and {counts['text']:,} texts."
    )


def search(
    index: Index,
    text: Annotated[str | None, typer.Argument(help="What to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to search by, alone or with the text.")] = None,
    hits: Annotated[int, typer.Option("--hits", "-k", min=1, help="How many.")] = 10,
    only: Annotated[str | None, typer.Option(help="image or text.")] = None,
    dim: Annotated[int | None, typer.Option(help="Search by so many dimensions.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or int8; the most exact if omitted.")] = None,
    weight: Annotated[float, typer.Option(min=0, max=1, help="Of the text, beside a picture.")] = 0.5,
    model: Model = None,
    database: Annotated[str | None, typer.Option(help="Search this LanceDB database in place of the index.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the hits as JSON.")] = False,
) -> None:
    """Print what is nearest to a text, a picture or both."""
    require(*_NEEDS, *(["lancedb"] if database else []))
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.items import KINDS
    from bifocal.hub.search.searcher import Searcher

    kinds = KINDS if only is None else (only,)
    searcher = Searcher(SearchIndex(index), model)
    vector = searcher.vector(text, image, weight)
    if database is not None:
        from bifocal.hub.search.lance import search_lance

        found = search_lance(database, vector, searcher.index.weights, hits, kinds)
    else:
        form = None if dim is None and precision is None else (dim or searcher.index.dimensions, precision or "float32")
        found = searcher.index.search(vector, hits, kinds, form)
    if not found:
        what = "texts" if only == "text" else "images" if only == "image" else "items"
        raise BifocalError(
            f"'{database or index}' has no {what}; add some with bifocal index, or search without --only."
        )
    if as_json:
        typer.echo(json.dumps([hit.plain() for hit in found], indent=2, ensure_ascii=False))
        return
    for rank, hit in enumerate(found, 1):
        said = f"  {hit.text[:100]}" if hit.text else ""
        also = f"  (also {', '.join(hit.other_names[:3])})" if hit.other_names else ""
        kind = "picture" if hit.kind == "image" else "text"
        typer.echo(f"{rank:>3}  {hit.score:.3f}  {kind:<7}  {hit.name}{said}{also}")


def remove(
    index: Index,
    names: Annotated[
        list[str] | None, typer.Argument(help="Names as the hits have them, or patterns of names.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Delete what was indexed from this path or Hub id.")] = None,
) -> None:
    """Delete items from an index, also from its files. Content that has other names stays under those."""
    if not names and source is None:
        raise BifocalError("Name what to delete: names as the hits have them, or a --source.")
    require(*_NEEDS)
    from bifocal.hub.search.index import SearchIndex

    writes_into(index)
    opened = SearchIndex(index)
    count = opened.remove(names or [], source)
    typer.echo(f"{count:,} deleted; {index} has {len(opened):,} left.")


def database(
    index: Index,
    uri: Annotated[str, typer.Argument(help="A folder, or an address that LanceDB knows (s3://, gs://, db://).")],
) -> None:
    """Copy an index into a LanceDB database; again, and only what changed is changed there."""
    require(*_NEEDS, "lancedb")
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.lance import copy_to_lance

    writes_into(Path(uri) if "://" not in uri else Path())
    count = copy_to_lance(SearchIndex(index), uri)
    typer.echo(f"{count:,} rows are at {uri}.")


def serve(
    index: Index,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 7860,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Search pictures and texts",
    model: Model = None,
    space: Annotated[
        Path | None, typer.Option(help="Write a folder that is a Space, for bifocal push, in place of serving.")
    ] = None,
) -> None:
    """Serve a search page over an index, or write it as a Space."""
    require(*_NEEDS, "gradio")
    from bifocal.hub.search.index import SearchIndex

    opened = SearchIndex(index)
    if space is not None:
        from bifocal.hub.space import write_space

        writes_into(space)
        write_space(opened, space, title, model)
        typer.echo(f"The Space is in {space}: bifocal push {space} organisation/name")
        return
    from bifocal.hub.search.page import build, launch
    from bifocal.hub.search.searcher import Searcher

    page = build(Searcher(opened, model), title)
    typer.echo(f"Serving {index} at http://{host}:{port} (Ctrl+C ends it).")
    launch(page, host, port)
