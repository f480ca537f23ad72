"""The commands `index`, `search`, `remove`, `export-lancedb`"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bifocal.cli.console import FAST_DECODING, IndexDtype, NumWorkers, require, writes_into
from bifocal.cli.data import Overrides
from bifocal.data.kinds import INDEXED
from bifocal.errors import BifocalError

if TYPE_CHECKING:
    from bifocal.hub.indexing import IndexSummary
    from bifocal.hub.search.hits import Hit
    from bifocal.hub.search.searchable import Searchable

Index = Annotated[Path, typer.Argument(help="Folder of an index.")]
Model = Annotated[str | None, typer.Option(help="Folder or Hub id of the index's model, if it was moved.")]
Approximate = Annotated[
    bool, typer.Option("--approximate", help="Search an approximate form that bifocal index --approximate made.")
]
Database = Annotated[
    str | None, typer.Option(help="Search this LanceDB database instead of an index: a folder or an address (s3://).")
]
Where = Annotated[
    str | None,
    typer.Option(help="Search the rows of the database that fulfil this condition of SQL: \"kind = 'text'\"."),
]
Hybrid = Annotated[bool, typer.Option("--hybrid", help="Rank the rows of the database by words, too.")]
NEEDS = ("datasets", "faiss", "filelock")
_MAX_NAMED = 5  # skipped items that are named; the others are counted


def index(
    source: Annotated[str, typer.Argument(help="A folder of images, a file of rows, a pattern or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder of the index. An existing index is added to.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; that of the index if it exists.")] = None,
    overrides: Overrides = None,
    kind: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(INDEXED)}; inferred if omitted. Of pairs, the positives are indexed."),
    ] = None,
    captions: Annotated[
        bool | None,
        typer.Option(
            "--captions/--no-captions", help="Find images by their captions, too; as in the last run if omitted."
        ),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete from the index what this source no longer has.")
    ] = False,
    dim: Annotated[
        list[int] | None,
        typer.Option(help="Number of leading dimensions to search by; can be repeated. All dimensions if omitted."),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="float32 or int8; can be repeated. float32 if omitted.")
    ] = None,
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="Search approximately from 50,000 images or texts on; measures recall@10."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images per forward pass.")] = 32,
    dtype: IndexDtype = None,
    num_workers: NumWorkers = None,
    fast_decoding: Annotated[
        bool | None,
        typer.Option(
            "--fast-decoding/--no-fast-decoding",
            help=f"{FAST_DECODING} An index keeps the decoding it was made with.",
        ),
    ] = None,
) -> None:
    """Embed images and texts for search. Run it again to resume, or to update the index from its source."""
    require(*NEEDS, "pydantic")
    from tqdm import tqdm

    from bifocal.data.image_files import printable
    from bifocal.data.source import parse_source
    from bifocal.hub.indexing import index_source

    writes_into(out, "free space and run the command again; it resumes")
    with tqdm(desc="Reading items", unit="", leave=False) as bar:
        summary = index_source(
            parse_source(source, overrides), out, model, kind, captions, prune, dim or [], precision or [],
            batch_size, progress=lambda count: bar.update(count - bar.n), dtype=dtype,
            num_workers=num_workers, fast_decoding=fast_decoding, approximate=approximate,
        )  # fmt: skip
    _print_summary(summary, printable(source), printable(str(out)), prune)


def _print_summary(
    summary: "IndexSummary",
    source: str,
    out: str,
    prune: bool,
) -> None:
    """Print what a run of `bifocal index` did.

    Raises:
        BifocalError: if nothing could be indexed.
    """
    from bifocal.hub.search.captions import count_in_words

    result, skipped = summary.result, summary.skipped
    for name, reason in skipped[:_MAX_NAMED]:
        typer.echo(f"Skipped: {name}: {reason}", err=True)
    if len(skipped) > _MAX_NAMED:
        typer.echo(f"... and {len(skipped) - _MAX_NAMED} more.", err=True)
    for files in summary.ignored:
        typer.echo(f"Skipped: {files}.", err=True)
    if not result.new + result.known + result.duplicates:
        raise BifocalError(f"Nothing in '{source}' could be indexed.")
    counted = [
        (result.duplicates, "duplicates kept as further names"), (result.updated, "captions updated"),
        (result.renamed, "renamed"), (result.replaced, "replaced"), (result.pruned, "pruned"),
        (len(skipped), "skipped"),
        (summary.images_without_row, "images without a row in the table, indexed without a caption"),
    ]  # fmt: skip
    parts = [f"{result.new:,} new", f"{result.known:,} known before"]
    parts += [f"{count:,} {what}" for count, what in counted if count]
    typer.echo(f"{', '.join(parts)}; {out} has {count_in_words(summary.counts)}.")
    for variant, accuracy in summary.approximate.items():
        if accuracy:
            typer.echo(f"{variant}: {accuracy}")
    if result.restored:
        typer.echo(f"{result.restored} parts of the table were missing. If they held other sources, index those again.")
    if result.missing and not prune:
        typer.echo(f"{result.missing:,} items in the index are missing from '{source}'. Pass --prune to delete them.")
    for path in summary.missing_sources:
        typer.echo(f"'{path}' was indexed but no longer exists. bifocal remove {out} --source PATH deletes its items.")
    if not summary.complete:
        typer.echo(f"'{source}' was not read completely, so missing items were not looked for.")


def search(
    index: Annotated[str | None, typer.Argument(help="Folder of an index. Omit it with --database.")] = None,
    text: Annotated[str | None, typer.Argument(help="Text to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to search for, alone or with the text.")] = None,
    hits: Annotated[int, typer.Option("--hits", "-k", min=1, help="Number of hits.")] = 10,
    only: Annotated[str | None, typer.Option(help="Search for only one kind: image or text.")] = None,
    dim: Annotated[
        int | None, typer.Option(help="Search by this number of leading dimensions; by all if omitted.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or int8; the most exact if omitted.")] = None,
    approximate: Approximate = False,
    weight: Annotated[float, typer.Option(min=0, max=1, help="Weight of the text against the image.")] = 0.5,
    model: Model = None,
    database: Database = None,
    where: Where = None,
    hybrid: Hybrid = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the hits as JSON.")] = False,
    dtype: IndexDtype = None,
) -> None:
    """Print the items that are nearest to a text, an image or both."""
    require(*NEEDS, *(["lancedb"] if database else []))
    from bifocal.embedding.items import KINDS
    from bifocal.hub.search.arguments import require_model_path, require_query
    from bifocal.hub.search.hits import check_kinds

    if database is not None:
        if text is not None:
            raise BifocalError("Search either an index or a database: omit the index, or --database.")
        index, text = None, index
        if dim is not None or precision is not None or approximate:
            raise BifocalError("--dim, --precision and --approximate choose a form of an index. Omit them.")
    kinds = KINDS if only is None else (only,)
    check_kinds(kinds)
    opened = open_searchable(index, database, where, hybrid)
    variant = opened.choose_variant(dim, precision, approximate)
    require_query(text, image)
    require_model_path(model or opened.model)

    from bifocal.hub.search.searcher import Searcher

    ranking = Searcher(opened, model, dtype=dtype).search(text, image, hits, kinds, weight, variant)
    if not ranking:
        counts = opened.counts()
        if database is not None and any(counts.values()):
            raise BifocalError(f"Nothing in '{database}' fits this search. Search by other words, or omit --only.")
        what = "texts" if only == "text" else "images" if only == "image" else "items"
        if only == "text" and counts["caption"]:
            what = "texts except captions, which belong to their images"
        raise BifocalError(f"'{database or index}' has no {what}. Add some with bifocal index, or omit --only.")
    if described := opened.describe(variant):
        typer.echo(described, err=True)
    if as_json:
        typer.echo(json.dumps([hit.to_dict() for hit in ranking], indent=2, ensure_ascii=False))
        return
    for rank, hit in enumerate(ranking, 1):
        typer.echo(_line(rank, hit))


def require_database_options(where: str | None, hybrid: bool) -> None:
    """Check that no option of a database is given.

    Raises:
        BifocalError: if one is.
    """
    if where is not None or hybrid:
        raise BifocalError("--where and --hybrid search a database. Pass --database, too.")


def open_searchable(index: str | Path | None, database: str | None, where: str | None, hybrid: bool) -> "Searchable":
    """Return the index or the database to search.

    Raises:
        BifocalError: if there is none or both, or options of one are given for the other.
    """
    if database is not None:
        if index is not None:
            raise BifocalError("Search either an index or a database: omit the index, or --database.")
        from bifocal.hub.lance.search import LanceIndex

        return LanceIndex(database, where, hybrid)
    require_database_options(where, hybrid)
    if index is None:
        raise BifocalError("Nothing to search. Pass the folder of an index, or --database.")
    from bifocal.hub.search.index import SearchIndex

    return SearchIndex(index)


def _line(rank: int, hit: "Hit") -> str:
    text = f"  {hit.text[:100]}" if hit.text else ""
    other_names = f"  (also {', '.join(hit.other_names[:3])})" if hit.other_names else ""
    matched = ""
    if hit.caption is not None:
        matched = "  (its caption)" if hit.caption == hit.text else f"  (its caption: {hit.caption[:100]})"
    return f"{rank:>3}  {hit.score:.3f}  {hit.kind:<5}  {hit.name}{text}{matched}{other_names}"


def remove(
    index: Index,
    names: Annotated[list[str] | None, typer.Argument(help="Names that hits show, or patterns of names.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Delete everything that was indexed from this local path or Hub id.")
    ] = None,
) -> None:
    """Delete items from an index, also from its files. Content with other names stays under those."""
    if not names and source is None:
        raise BifocalError("Nothing to delete. Pass names that hits show, or --source.")
    require(*NEEDS)
    from bifocal.hub.search.index import SearchIndex

    writes_into(index)
    opened = SearchIndex(index)
    count = opened.remove(names or [], source)
    typer.echo(f"{count:,} deleted; {index} has {len(opened):,} left.")


def export_lancedb(
    index: Index,
    uri: Annotated[str, typer.Argument(help="A folder, or an address that LanceDB knows (s3://, gs://, db://).")],
) -> None:
    """Write an index's items to a LanceDB database. Run it again to update the database."""
    require(*NEEDS, "lancedb")
    from bifocal.hub.lance.export import export_to_lancedb
    from bifocal.hub.search.index import SearchIndex

    writes_into(Path(uri) if "://" not in uri else Path())
    result = export_to_lancedb(SearchIndex(index), uri)
    typer.echo(
        f"{result.written} parts written, {result.unchanged} unchanged, {result.deleted} deleted; {result.finished}."
    )
