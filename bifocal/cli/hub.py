"""The commands `convert`, `export` and `push`: from weights that exist to a model on the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import require, writes_into
from bifocal.errors import BifocalError


def convert(
    source: Annotated[
        str, typer.Argument(help="A Hub id, a folder or a file of weights: jina-clip-v1, JinaBERT, EVA02.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the Bifocal model; an earlier one is replaced.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize the position table for pictures of so many pixels.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .bin and .pt, with weights_only=True.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how each tensor would be mapped, then exit.")
    ] = False,
) -> None:
    """Make a Bifocal model of published weights; every tensor is accounted for, or nothing is written."""
    require("sentence_transformers")
    from bifocal.files import MODEL, require_replaceable
    from bifocal.hub import convert as conversion
    from bifocal.hub.weights import read_weights

    tensors, config = read_weights(source, allow_pickle)
    plan = conversion.plan_conversion(tensors, config, image_size)
    if dry_run:
        typer.echo(plan.text())
        return
    writes_into(out)
    require_replaceable(out, MODEL)
    lacks = conversion.save_converted(conversion.build(plan), source, out)
    typer.echo(f"The model is in {out}" + (f"; it lacks {', '.join(lacks)}." if lacks else "."))


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or of a model.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder for all that the Hub should have; an unchanged earlier export is replaced."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The repository it is meant for, organisation/name.")] = None,
    description: Annotated[str | None, typer.Option(help="What the model is for, in a sentence or two.")] = None,
    license: Annotated[str | None, typer.Option(help="As the Hub names it, such as apache-2.0.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of bifocal evaluate, for the card.")] = None,
    examples: Annotated[
        str | None, typer.Option(help="Pictures with captions on which int8 is measured; drawings if none.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Also write ONNX files.")] = True,
    shard: Annotated[str, typer.Option(help="Largest file of weights.")] = "2GB",
    check: Annotated[
        bool, typer.Option("--check", help="Load it in every way in a fresh process and compare; alone: check RUN.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let --check run code that is not Bifocal's own.")
    ] = False,
) -> None:
    """Write one folder with everything: weights, code, ONNX, card, recipes, results, licence, examples."""
    require("jinja2", "sentence_transformers", *(["onnx", "onnxruntime", "onnxscript"] if onnx and out else []))
    if out is None and not check:
        raise BifocalError("Name a folder to export to, or add --check to look at one that is exported.")
    if out is not None:
        from bifocal.files import parts
        from bifocal.hub.export import left_out
        from bifocal.hub.release_run import release_run

        before = parts(out)
        writes_into(out)
        release_run(run, out, name, description, license, results, examples, onnx, shard)
        typer.echo(f"The model is in {out}.")
        if gone := left_out(before, out):
            typer.echo(f"It leaves out {gone}, which the earlier export had.")
    if check:
        from bifocal.hub.check import check_folder

        found = check_folder(out or run, trust_remote_code)
        typer.echo(found.text())
        if found.problems:
            raise BifocalError(
                f"'{out or run}' should not be published as it is ({len(found.problems)} problems above)."
            )
        typer.echo(f"'{out or run}' is ready: bifocal push {out or run} {name or 'organisation/name'}")


def push(
    folder: Annotated[Path, typer.Argument(help="An exported model, or a Space made by bifocal serve --space.")],
    repository: Annotated[str, typer.Argument(help="organisation/name")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made if there is none.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Propose the change as a pull request.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Replace files that are there without asking.")] = False,
) -> None:
    """Publish an exported model or a Space on the Hub."""
    import sys

    from bifocal.hub import push as publishing

    def may_overwrite(name: str) -> bool:
        return yes or (sys.stdin.isatty() and typer.confirm(f"'{name}' has files already. Replace them?"))

    upload = publishing.look(folder)
    typer.echo(upload.text())
    if upload.called not in (None, repository):
        typer.echo(f"Note: its card loads '{upload.called}'; export with --name {repository} to change that.")
    url = publishing.push(folder, repository, private, revision, pr, may_overwrite)
    typer.echo(f"Published: {url}")
