"""The commands `convert`, `export` and `push`: convert published weights, export a model, publish it on the Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import require, writes_into
from bifocal.errors import BifocalError


def convert(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Hub id or folder of a dual encoder (CLIP, SigLIP, SigLIP 2, MetaCLIP 2, Chinese-CLIP, AltCLIP), or "
            "weights of jina-clip-v1 or v2, JinaBERT v2 or EVA02. With --text and --image, omit it.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder for the Bifocal model; an unchanged earlier one is replaced.", show_default=False),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of a text encoder, to join with --image; or of a dual encoder with one."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of an image encoder, to join with --text; or of a dual encoder with one."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="key=value of the model's configuration, such as projection_dim=512 or text_pooling=mean."
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels to resize EVA02's position table for.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="LoRA adapter of jina-clip-v2 to merge into the weights, such as retrieval.query, or none; the "
            "default of its config.json if omitted."
        ),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .bin and .pt, with weights_only=True.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how each tensor would be mapped, then exit.")
    ] = False,
) -> None:
    """Convert published weights to a Bifocal model. Every tensor is accounted for, or nothing is written."""
    require("sentence_transformers")
    from bifocal.files import MODEL, require_replaceable
    from bifocal.hub.checkpoint_files import read_config, require_apart, require_weights

    joins = text is not None and image is not None
    if not joins and (text is not None or image is not None):
        missing = "--text" if text is None else "--image"
        raise BifocalError(f"{missing} is missing. Two towers need --text and --image.")
    if joins and out is not None:
        raise BifocalError("SOURCE and --text with --image exclude each other. Give one of them, and OUT.")
    if joins:
        source, out = None, None if source is None else Path(source)
    if (source is None and not joins) or (out is None and not dry_run):
        raise BifocalError("OUT is missing. Write bifocal convert SOURCE OUT, or --text A --image B OUT.")
    if out is not None and not dry_run:
        for path in filter(None, (source, text, image)):
            require_apart(out, path)
        writes_into(out)
        require_replaceable(out, MODEL)
    of_source = {} if joins else read_config(str(source), allow_pickle)
    if of_source.get("model_type") == "bifocal":
        raise BifocalError(f"'{source}' is a Bifocal model already. Load or copy it.")
    for path in filter(None, (source, text, image)):
        require_weights(path, allow_pickle)

    from bifocal.hub.convert import build_model, plan_conversion, save_converted
    from bifocal.hub.convert_towers import convert_dual_encoder, explain_tower, is_dual_encoder, join_towers
    from bifocal.hub.source_files import read_licence
    from bifocal.hub.weights import read_weights

    if joins or is_dual_encoder(of_source):
        if image_size is not None:
            raise BifocalError("--image-size is for EVA02, but other image towers keep their size. Omit it.")
        if adapter is not None:
            raise BifocalError("--adapter is for jina-clip-v2, but these weights have no adapters. Omit it.")
        if text is not None and image is not None:
            joined = join_towers(text, image, settings or [], allow_pickle)
        else:
            joined = convert_dual_encoder(str(source), settings or [], allow_pickle)
        if dry_run or out is None:
            typer.echo(joined.text())
            return
        joined.save(out)
        typer.echo(f"{joined.summary()}\nThe model is in {out}.")
        return
    if settings:
        raise BifocalError("--set is for dual encoders and two towers, but these weights have one form. Omit it.")
    tensors, config = read_weights(str(source), allow_pickle)
    with explain_tower(str(source), config):
        plan = plan_conversion(tensors, config, image_size, adapter)
    if dry_run or out is None:
        typer.echo(plan.text())
        return
    licence, merged = read_licence(str(source), plan.layouts), plan.adapter_text() if plan.adapters else ""
    without = save_converted(build_model(plan), str(source), out, licence, merged)
    if licence is not None:
        limit = ", which forbids commercial use" if "-nc" in licence else ""
        typer.echo(f"The weights are licensed under {licence}{limit}.")
    where = f"The model is in {out}" + (f", {merged}" if merged else "")
    typer.echo(where + (f"; it has no {', no '.join(without)}." if without else "."))


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or of a model.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to write; an unchanged earlier export is replaced.")
    ] = None,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository that the card's code loads: organisation/name.")
    ] = None,
    description: Annotated[str | None, typer.Option(help="What the model is for, in a sentence or two.")] = None,
    license: Annotated[str | None, typer.Option(help="Name of the licence on the Hub, such as apache-2.0.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of bifocal evaluate, for the card.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Also write ONNX files.")] = True,
    onnx_eval_data: Annotated[
        str | None,
        typer.Option(
            help="Image-text source on which the ONNX files are compared with torch; sample drawings if omitted."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weights file.")] = "2GB",
    check: Annotated[
        bool,
        typer.Option("--check", help="Load the export in every way and compare the vectors; without OUT, check RUN."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let --check run code that is not Bifocal's.")
    ] = False,
) -> None:
    """Write a folder for the Hub: weights, code, ONNX files, card, recipes, results, licence and examples."""
    if out is None and not check:
        raise BifocalError("Give a folder to export to, or add --check to check an existing export.")
    require("jinja2", "matplotlib", "sentence_transformers", "yaml")
    if out is not None:
        if onnx:
            require("onnx", "onnxruntime", "onnxscript")
        from bifocal.files import parts
        from bifocal.hub.export_arguments import check_export

        writes_into(out)
        check_export(run, out, repo_id, results, onnx_eval_data, max_shard_size)

        from bifocal.hub.export import missing_parts
        from bifocal.hub.export_run import export_run

        before = parts(out)
        export_run(run, out, repo_id, description, license, results, onnx, onnx_eval_data, max_shard_size)
        typer.echo(f"The model is in {out}.")
        if missing := missing_parts(before, out):
            typer.echo(f"It no longer has {missing}, which the earlier export had.")
    if check:
        from bifocal.hub.push import validate_folder

        folder = out or run
        validate_folder(folder)

        from bifocal.hub.check import check_folder

        result = check_folder(folder, trust_remote_code)
        typer.echo(result.text())
        if result.problems:
            raise BifocalError(f"'{folder}' should not be published as it is ({len(result.problems)} problems above).")
        typer.echo(f"'{folder}' is ready: bifocal push {folder} {repo_id or 'organisation/name'}")


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an exported model or a Space (bifocal serve --space, --static).")
    ],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: organisation/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Overwrite existing files without asking.")] = False,
) -> None:
    """Publish an exported model or a Space on the Hub."""
    from bifocal.hub.push import push as upload_folder
    from bifocal.hub.push import validate_folder

    def may_overwrite(repo_id: str) -> bool:
        return yes or (sys.stdin.isatty() and typer.confirm(f"'{repo_id}' has files already. Overwrite them?"))

    upload = validate_folder(folder)
    typer.echo(upload.text())
    if upload.repo_id_on_card not in (None, repo_id):
        typer.echo(f"Note: its card loads '{upload.repo_id_on_card}'. To change that, export with --repo-id {repo_id}.")
    url = upload_folder(folder, repo_id, private, revision, create_pr, may_overwrite)
    typer.echo(f"Published: {url}")
