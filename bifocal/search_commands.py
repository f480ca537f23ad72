"""The commands `index`, `search`, `remove`, `database` and `serve`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bifocal.console import fail, one_sentence, require
from bifocal.data_commands import Overrides

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
    captions: Annotated[bool, typer.Option("--captions", help="Also index the captions of pictures as texts.")] = False,
    dims: Annotated[
        list[int] | None, typer.Option(help="Also search by so many leading dimensions; several times.")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="float32, int8; several times.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images per forward pass.")] = 32,
) -> None:
    """Embed pictures and texts for search; a killed run goes on, and nothing is embedded twice."""
    require(*_NEEDS, "pydantic")
    from tqdm import tqdm

    from bifocal.hub.search.index import SearchIndex, weights_of
    from bifocal.hub.search.items import SearchError
    from bifocal.hub.search.searcher import Searcher, load_model
    from bifocal.indexing import items_of, kind_of
    from bifocal.training.recipe import source_of

    faults: list[tuple[str, str]] = []
    try:
        with one_sentence(out, "free space and start again; it goes on from there"):
            given = source_of(source, overrides)
            rows = kind_of(given, kind)
            place = model or (SearchIndex(out).model if (out / "index.json").exists() else None)
            if place is None:
                fail("Name the model that embeds, a Bifocal folder or Hub id, with --model.")
            dimensions = load_model(place).config.projection_dim
            made = SearchIndex.create(out, place, weights_of(place), dimensions, dims or [], precision or ["float32"])
            with tqdm(desc="Looking at items", unit="", leave=False) as bar:
                done = Searcher(made, place).add(
                    items_of(given, rows, captions, faults), batch_size, lambda number: bar.update(number - bar.n)
                )
    except SearchError as error:
        fail(str(error))
    faults += done.failed
    for name, reason in faults[:5]:
        typer.echo(f"Left out: {name}: {reason}", err=True)
    if len(faults) > 5:
        typer.echo(f"... and {len(faults) - 5} more.", err=True)
    if not len(made):
        fail(f"Nothing in '{source}' could be indexed.")
    counts = made.counts()
    left_out = f", {len(faults):,} left out" if faults else ""
    typer.echo(
        f"{done.count:,} new, {done.known:,} known before{left_out}; {out} has {counts['image']:,} pictures and "
        f"{counts['text']:,} texts."
    )


def search(
    index: Index,
    text: Annotated[str | None, typer.Argument(help="What to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to search by, alone or with the text.")] = None,
    hits: Annotated[int, typer.Option("--hits", "-k", min=1, help="How many.")] = 10,
    only: Annotated[str | None, typer.Option(help="image or text.")] = None,
    dim: Annotated[int | None, typer.Option(help="Search by so many dimensions.")] = None,
    precision: Annotated[str, typer.Option(help="float32 or int8; with --dim.")] = "float32",
    weight: Annotated[float, typer.Option(min=0, max=1, help="Of the text, beside a picture.")] = 0.5,
    model: Model = None,
    database: Annotated[str | None, typer.Option(help="Search this LanceDB database in place of the index.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the hits as JSON.")] = False,
) -> None:
    """Print what is nearest to a text, a picture or both."""
    require(*_NEEDS, *(["lancedb"] if database else []))
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.items import KINDS, SearchError
    from bifocal.hub.search.searcher import Searcher

    kinds = KINDS if only is None else (only,)
    try:
        searcher = Searcher(SearchIndex(index), model)
        vector = searcher.vector(text, image, weight)
        if database is not None:
            from bifocal.hub.search.lance import search_lance

            found = search_lance(database, vector, searcher.index.weights, hits, kinds)
        else:
            found = searcher.index.search(vector, hits, kinds, None if dim is None else (dim, precision))
    except SearchError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps([hit.plain() for hit in found], indent=2, ensure_ascii=False))
        return
    for rank, hit in enumerate(found, 1):
        said = f"  {hit.text[:100]}" if hit.text else ""
        typer.echo(f"{rank:>3}  {hit.score:.3f}  {'picture' if hit.kind == 'image' else 'text':<7}  {hit.name}{said}")


def remove(
    index: Index,
    names: Annotated[list[str], typer.Argument(help="Names as the hits have them, or patterns of names.")],
) -> None:
    """Delete items from an index, also from its files."""
    require(*_NEEDS)
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.items import SearchError

    try:
        with one_sentence(index):
            opened = SearchIndex(index)
            count = opened.remove(names)
    except SearchError as error:
        fail(str(error))
    typer.echo(f"{count:,} deleted; {index} has {len(opened):,} left.")


def database(
    index: Index,
    uri: Annotated[str, typer.Argument(help="A folder, or an address that LanceDB knows (s3://, gs://, db://).")],
) -> None:
    """Copy an index into a LanceDB database; again, and only what changed is changed there."""
    require(*_NEEDS, "lancedb")
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.items import SearchError
    from bifocal.hub.search.lance import copy_to_lance

    try:
        with one_sentence(Path(uri) if "://" not in uri else Path()):
            count = copy_to_lance(SearchIndex(index), uri)
    except SearchError as error:
        fail(str(error))
    typer.echo(f"{count:,} rows are at {uri}.")


def serve(
    index: Index,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Search pictures and texts",
    model: Model = None,
    space: Annotated[
        Path | None, typer.Option(help="Write a folder that is a Space, for bifocal push, in place of serving.")
    ] = None,
) -> None:
    """Serve a search page over an index, or write it as a Space."""
    require(*_NEEDS, "gradio")
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.items import SearchError

    try:
        opened = SearchIndex(index)
        if space is not None:
            from bifocal.hub.space import write_space

            with one_sentence(space):
                write_space(opened, space, title)
            typer.echo(f"The Space is in {space}: bifocal push {space} organisation/name")
            return
        from bifocal.hub.search.page import build, launch
        from bifocal.hub.search.searcher import Searcher

        page = build(Searcher(opened, model), title)
        typer.echo(f"Serving {index} at http://{host}:{port} (Ctrl+C ends it).")
        launch(page, host, port)
    except SearchError as error:
        fail(str(error))
    except OSError as error:
        fail(f"Cannot listen on {host}:{port} ({error}); choose another --port.")
