"""The command `embed`."""

from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import FastDecoding, IndexDtype, NumWorkers, require, writes_into
from bifocal.cli.data import Overrides
from bifocal.data.kinds import INDEXED
from bifocal.errors import BifocalError

_MAX_NAMED = 5  # skipped rows that are named; all are in the records of the parts


def embed(
    source: Annotated[str, typer.Argument(help="Files, a pattern, a folder of images or shards, or a Hub id.")],
    out: Annotated[str, typer.Argument(help="Folder of Parquet files to write, or an address (s3://, gs://).")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of the model.")],
    overrides: Overrides = None,
    kind: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(INDEXED)}; inferred if omitted. Of pairs, the positives are embedded."),
    ] = None,
    captions: Annotated[bool, typer.Option("--captions", help="Also embed captions of images as texts.")] = False,
    dim: Annotated[
        int | None, typer.Option(help="Number of leading dimensions to keep, of length 1 again; all if omitted.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, float16, or int8: 127 times the unit vector, rounded.")
    ] = "float32",
    query: Annotated[
        bool, typer.Option("--query", help="Embed texts as queries of a search, with the model's prompt for them.")
    ] = False,
    thumbnails: Annotated[bool, typer.Option(help="Keep a thumbnail of each image.")] = True,
    database: Annotated[
        bool, typer.Option("--database", help="OUT is a LanceDB database, for bifocal search --database.")
    ] = False,
    rows_per_part: Annotated[
        int, typer.Option(min=1, help="Rows per part. A killed run loses the parts that it was embedding.")
    ] = 4096,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine, each with the model.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or local. Needs bifocal\\[ray].")] = None,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs per Ray actor.")] = 0,
    num_cpus: Annotated[float, typer.Option(min=0, help="CPUs per Ray actor.")] = 1,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Number of Ray actors; as many as fit if omitted.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images per forward pass.")] = 32,
    dtype: IndexDtype = None,
    num_workers: NumWorkers = None,
    fast_decoding: FastDecoding = False,
) -> None:
    """Embed images and texts into a table of vectors. Run it again to resume."""
    require("datasets", "pydantic", "pyarrow", "tqdm", *(["lancedb"] if database else []))
    from bifocal.data.source import parse_source
    from bifocal.hub.embed.arguments import require_precision, require_table_or_nothing
    from bifocal.hub.item_reader import infer_kind
    from bifocal.hub.search.arguments import require_model_path

    require_precision(precision)
    require_model_path(model)
    if database:
        from bifocal.hub.lance.parts import LanceParts, require_database_precision

        require_database_precision(precision)
        LanceParts(out).recorded()
    else:
        require_table_or_nothing(out)
    parsed = parse_source(source, overrides)
    kind = infer_kind(parsed, kind)
    writes_into(Path(out) if "://" not in out else Path(), "free space and run the command again; it resumes")

    # Not before the arguments are checked: it imports torch.
    from tqdm import tqdm

    from bifocal.data.parallel import Execution
    from bifocal.hub.embed.parts import ParquetParts
    from bifocal.hub.embed.run import Choices, embed_source, expected_rows
    from bifocal.hub.embed.settings import Speed

    execution = Execution(workers, ray, num_gpus, num_cpus, concurrency)
    choices = Choices(model, kind, captions, dim, precision, dtype, query, fast_decoding, thumbnails, rows_per_part)
    exclude = [Path(out)] if "://" not in out else []
    parts = LanceParts(out) if database else ParquetParts(out)
    with tqdm(desc="Rows", unit="", total=expected_rows(parsed), smoothing=0.05, leave=False) as bar:
        summary = embed_source(parsed, parts, choices, Speed(batch_size, num_workers), execution, exclude, bar.update)
    for name, reason in summary.skipped[:_MAX_NAMED]:
        typer.echo(f"Skipped: {name}: {reason}", err=True)
    if len(summary.skipped) > _MAX_NAMED:
        typer.echo(f"... and {len(summary.skipped) - _MAX_NAMED} more.", err=True)
    for files in summary.ignored:
        typer.echo(f"Skipped: {files}.", err=True)
    counts = [f"{summary.new:,} embedded", f"{summary.known:,} embedded before", f"{len(summary.skipped):,} skipped"]
    if summary.failed:
        for failed in summary.failed[:_MAX_NAMED]:
            typer.echo(f"Failed: {failed.name}: {failed.message}", err=True)
        raise BifocalError(
            f"{', '.join(counts)}; {len(summary.failed)} of the files or parts failed. Run the command again for the "
            "rest."
        )
    if not summary.new + summary.known:
        raise BifocalError(f"Nothing in '{source}' could be embedded.")
    typer.echo(f"{', '.join(counts)}; {summary.finished}.")
