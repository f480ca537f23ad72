"""The commands `bifocal data ...`: list corpora, inspect and clean sources, caption images."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import Ray, Workers, require, writes_into
from bifocal.data.kinds import KINDS
from bifocal.errors import BifocalError

data = typer.Typer(name="data", help="Inspect and clean training data, caption images.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value of a source, such as column_mapping.title=caption, image_root=FOLDER, delimiter=';' or "
        "clean.min_image_size=64."
    ),
]
SourceArgument = Annotated[str, typer.Argument(help="Files, a pattern, a folder, a Hub id or corpus:NAME.")]
Kind = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(KINDS)}; inferred from the columns if omitted."),
]


@data.command("list")
def list_corpora(
    kind: Annotated[str | None, typer.Option(help="Only corpora of this kind, such as text-pair.")] = None,
    language: Annotated[str | None, typer.Option(help="Only corpora in this language, such as en.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Only corpora with this in their licence; stated: with any licence.")
    ] = None,
) -> None:
    """List the public corpora and mixtures that a recipe can name."""
    require("pydantic", "yaml")
    from bifocal.data.corpora import listing
    from bifocal.data.mixtures import mixture_list

    typer.echo(listing(_kind(kind), language, licence))
    if kind is language is licence is None:
        typer.echo(f"\n{mixture_list()}")


@data.command()
def show(
    name: Annotated[str, typer.Argument(help="A corpus or mixture, from `bifocal data list`, or a recipe.")],
) -> None:
    """Show what is known about a corpus, or the shares and licences of a mixture or of a recipe's data."""
    require("pydantic", "yaml")
    from bifocal.data.corpora import corpora, corpus_hint, explained
    from bifocal.data.mixtures import explained_mixture, shipped_mixtures
    from bifocal.training.data_summary import data_summary
    from bifocal.training.recipe import find_recipe, load_recipe
    from bifocal.training.shipped_recipes import shipped_recipes

    if name in shipped_recipes() or name.endswith((".yaml", ".yml")):
        typer.echo(data_summary(load_recipe(find_recipe(name), training_values=False)))
    elif name in shipped_mixtures():
        typer.echo(explained_mixture(name))
    elif name in corpora():
        typer.echo(explained(name))
    else:
        hint = corpus_hint(name, [*shipped_mixtures(), *shipped_recipes()])
        raise BifocalError(f"There is no corpus, mixture or recipe '{name}'; {hint}")


@data.command()
def inspect(
    source: SourceArgument,
    overrides: Overrides = None,
    kind: Kind = None,
    rows: Annotated[int, typer.Option(min=0, help="Number of rows to inspect; 0 means all.")] = 10_000,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("runs/data.html"),
) -> None:
    """Write a page about a source: counts, lengths, sizes, duplicates, a sample, skipped rows and their causes."""
    require("datasets", "datasketch", "faiss", "imagehash", "jinja2", "matplotlib", "pydantic")
    from bifocal.data.inspection import inspect_source
    from bifocal.data.inspection_page import PAGE, write_data_page
    from bifocal.data.loading import infer_kind
    from bifocal.data.source import parse_source
    from bifocal.files import require_overwritable

    if out.is_dir():
        raise BifocalError(f"'{out}' is a folder. Give the HTML file to write with --out.")
    writes_into(out.parent)
    require_overwritable(out, PAGE)
    parsed = parse_source(source, overrides)
    inspection = inspect_source(parsed, _kind(kind) or infer_kind(parsed), rows or None)
    write_data_page(asdict(inspection), out)
    typer.echo(f"{inspection.good:,} of {inspection.rows:,} rows can be used; see {out}.")


@data.command()
def clean(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder of Parquet files to write.")],
    overrides: Overrides = None,
    kind: Kind = None,
    workers: Workers = 1,
    ray: Ray = None,
) -> None:
    """Write the rows of a source that pass its filters as Parquet files, to be streamed; a killed run resumes."""
    require("datasets", "pydantic")
    from bifocal.data.clean_copy import write_clean
    from bifocal.data.loading import infer_kind
    from bifocal.data.parallel import Execution
    from bifocal.data.skips import SkipLog, summary
    from bifocal.data.source import parse_source

    writes_into(out)
    execution = Execution(workers, ray)
    skipped = SkipLog(out / "skipped.jsonl")
    parsed = parse_source(source, overrides)
    rows = write_clean(parsed, _kind(kind) or infer_kind(parsed), out, skipped, execution)
    skips: Counter[str] = Counter()
    for counts in [*skipped.bad.values(), *skipped.filtered.values()]:
        skips += counts
    note = f"; skipped: {summary(skips)} (see {out / 'skipped.jsonl'})" if skips else ""
    typer.echo(f"{rows:,} rows are in {out}{note}.")


@data.command()
def leakage(
    train: Annotated[str, typer.Argument(help="Training data: files, a pattern, a folder, a Hub id or corpus:NAME.")],
    evaluation: Annotated[str, typer.Argument(help="Evaluation set, named in the same way.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value of a source, with train. or evaluation. before it: train.column_mapping.t=query."
        ),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of the training rows; inferred if omitted.")] = None,
    evaluation_kind: Annotated[str | None, typer.Option(help="Kind of the evaluation's rows, likewise.")] = None,
    out: Annotated[Path, typer.Option(help="JSONL file to write, a line for each leak.")] = Path("runs/leakage.jsonl"),
    max_distance: Annotated[
        int, typer.Option(min=0, max=16, help="Bits of 64 in which hashes of near-duplicate images differ at most.")
    ] = 8,
    min_similarity: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Least Jaccard similarity of near-duplicate texts.")
    ] = 0.8,
    fail_above: Annotated[
        int | None, typer.Option(min=0, help="Exit with an error if more training rows are leaked.")
    ] = None,
) -> None:
    """Find and name the rows of training data that are in an evaluation set, exactly or as near-duplicates."""
    require("datasets", "datasketch", "faiss", "imagehash", "pydantic")
    from bifocal.data.leakage_report import LEAKS, compare_sources, write_leaks
    from bifocal.data.source import parse_source
    from bifocal.files import require_overwritable

    if out.is_dir():
        raise BifocalError(f"'{out}' is a folder. Give the JSONL file to write with --out.")
    writes_into(out.parent)
    require_overwritable(out, LEAKS)
    settings: dict[str, list[str]] = {"train": [], "evaluation": []}
    for override in overrides or []:
        side, _, setting = override.partition(".")
        if side not in settings:
            raise BifocalError(f"'{override}' names no source. Write train.{override} or evaluation.{override}.")
        settings[side].append(setting)
    sources = parse_source(train, settings["train"]), parse_source(evaluation, settings["evaluation"])
    result = compare_sources(*sources, (_kind(kind), _kind(evaluation_kind)), max_distance, min_similarity)
    write_leaks(result, out)
    typer.echo(f"{result.summary()}\nAll leaks are named in {out}.")
    leaked = len(result.leaked_rows())
    if fail_above is not None and leaked > fail_above:
        raise BifocalError(f"{leaked:,} rows are leaked, more than --fail-above {fail_above}. See {out}.")


@data.command()
def caption(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the captions; a killed run resumes.")],
    model: Annotated[str, typer.Option(help="An image-text model of transformers, by Hub id or folder.")],
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with the prompt; Bifocal's own if omitted.")] = None,
) -> None:
    """Generate long captions for images with any image-text model, as training data for stage 2."""
    require("datasets", "pydantic")
    from bifocal.data.captioning import caption_recipe, caption_source
    from bifocal.data.source import parse_source

    writes_into(out, "free space and run the command again; it resumes")
    counts = caption_source(parse_source(source, overrides), out, caption_recipe(model, recipe))
    before = f", {counts.existing:,} existed before" if counts.existing else ""
    skipped = f", {counts.skipped:,} skipped (see {out / 'skipped.jsonl'})" if counts.skipped else ""
    typer.echo(
        f"{counts.captioned:,} captions are in {out}{before}{skipped}; in a recipe: "
        f"path: {out}/*.parquet, image_root: /."
    )


def _kind(kind: str | None) -> str | None:
    if kind is not None and kind not in KINDS:
        raise BifocalError(f"'{kind}' is not a kind of rows. Use one of {', '.join(KINDS)}.")
    return kind
