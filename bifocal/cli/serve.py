"""The command `serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bifocal.cli.console import IndexDtype, require, writes_into
from bifocal.cli.search import (
    NEEDS,
    Approximate,
    Database,
    Hybrid,
    Where,
    open_searchable,
    require_database_options,
)
from bifocal.errors import BifocalError

if TYPE_CHECKING:
    from bifocal.hub.search.index import SearchIndex

_API_NEEDS = ("fastapi", "httpx", "orjson", "prometheus_client", "uvicorn")
_GITHUB_LIMIT = 100 * 2**20  # bytes of a file


def serve(
    index: Annotated[
        Path | None, typer.Argument(help="Folder of an index; none with --database, or for --model FOLDER --api.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 7860,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Search images and texts",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id: of the index's model if it was moved, or what --api serves."),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="Write a Space into this folder, for bifocal push, instead of serving.")
    ] = None,
    api: Annotated[
        bool, typer.Option("--api", help="Also serve programs: /v1/embeddings, /v1/search and more, listed at /docs.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that programs must send; BIFOCAL_API_KEY if omitted. There is no page then."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name that programs call the model by; its Hub id or folder's name if omitted.")
    ] = None,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Let programs send public addresses of images.")
    ] = False,
    max_queue: Annotated[
        int | None,
        typer.Option(min=1, help="Most texts and images of programs that wait at once; 4,096 if omitted."),
    ] = None,
    static: Annotated[
        Path | None,
        typer.Option(help="Write a page that needs no server into this folder, for a static host, instead of serving."),
    ] = None,
    with_images: Annotated[
        bool, typer.Option("--with-images", help="With --static: include what visitors need to search by their images.")
    ] = False,
    npm_packages: Annotated[
        Path | None,
        typer.Option(help="With --static: folder with tarballs of npm pack; downloaded and cached if omitted."),
    ] = None,
    dtype: IndexDtype = None,
    approximate: Approximate = False,
    database: Database = None,
    where: Where = None,
    hybrid: Hybrid = False,
) -> None:
    """Serve an index or a database as a page, to programs, an index also as a Space or static page; or only a model."""
    if static is None and (with_images or npm_packages is not None):
        raise BifocalError("--with-images and --npm-packages are for a static page. Pass --static FOLDER, too.")
    if not api and (api_key is not None or model_name is not None or allow_image_urls or max_queue is not None):
        raise BifocalError(
            "--api-key, --model-name, --allow-image-urls and --max-queue are options of --api. Pass --api, too."
        )
    if sum((api, space is not None, static is not None)) > 1:
        raise BifocalError("--api, --space and --static are different ways to serve. Pass one of them.")
    if api:
        require(*_API_NEEDS)
        from bifocal.hub.api.server import bind
        from bifocal.hub.api.settings import MAX_QUEUE, Settings, read_key

        settings = Settings(read_key(api_key), allow_image_urls, MAX_QUEUE if max_queue is None else max_queue)
    from bifocal.hub.search.arguments import require_model_path

    if index is None and database is None:
        if not api or model is None:
            raise BifocalError(
                "Pass the folder of an index, --database, or --model FOLDER with --api to serve only embeddings."
            )
        require_database_options(where, hybrid)
        require_model_path(model)
        bound = bind(host, port)  # before anything heavy is imported

        from bifocal.hub.api.command import serve_api

        serve_api(None, model, bound, settings, dtype=dtype, model_name=model_name)
        return
    require(*NEEDS, *(["gradio"] if static is None else ["onnx", "onnxruntime", "onnxscript"]))
    require(*(["lancedb"] if database else []))
    from bifocal.hub.search.index import SearchIndex

    if approximate and (space is not None or static is not None):
        raise BifocalError("--approximate chooses what is served here. Omit it with --space and --static.")
    opened = open_searchable(index, database, where, hybrid)
    if static is not None:
        if not isinstance(opened, SearchIndex):
            raise BifocalError("A static page holds its whole index. Pass the folder of an index, or omit --static.")
        _write_static_site(opened, static, title, model, with_images, npm_packages)
        return
    if space is not None:
        if not isinstance(opened, SearchIndex):
            raise BifocalError("A Space holds its whole index. Pass the folder of an index, or omit --space.")
        from bifocal.hub.space_arguments import check_space

        writes_into(space)
        check_space(opened, space, opened.model if model is None else model)

        from bifocal.hub.space import write_space

        write_space(opened, space, title, model)
        typer.echo(f"The Space is in {space}. Publish it with: bifocal push {space} organisation/name")
        return
    require_model_path(model or opened.model)
    variant = opened.choose_variant(approximate=approximate)
    if api:
        bound = bind(host, port)

        from bifocal.hub.api.command import serve_api

        serve_api(opened, model, bound, settings, title=title, dtype=dtype, model_name=model_name, variant=variant)
        return

    from bifocal.hub.search.page import build_page, launch
    from bifocal.hub.search.searcher import Searcher

    page = build_page(Searcher(opened, model, dtype=dtype, variant=variant), title)
    if accuracy := opened.describe(variant):
        typer.echo(accuracy)
    typer.echo(f"Serving {database or index} at http://{host}:{port} (Ctrl+C stops it).")
    launch(page, host, port)


def _write_static_site(
    index: "SearchIndex", out: Path, title: str, model: str | None, with_images: bool, npm_packages: Path | None
) -> None:
    from bifocal.hub.search.captions import count_in_words
    from bifocal.hub.static_site.arguments import check_site

    writes_into(out)
    check_site(index, out, index.model if model is None else model, npm_packages)

    from bifocal.hub.static_site.site import describe_differences, write_site

    summary = write_site(index, out, title, model, with_images, npm_packages)
    sizes = ", ".join(f"{part} {size / 1e6:,.1f}" for part, size in summary.sizes.items())
    total = sum(summary.sizes.values()) / 1e6
    typer.echo(f"{out} has {count_in_words(summary.counts)} in {total:,.1f} MB ({sizes}).")
    typer.echo(describe_differences(summary.differences))
    if summary.largest_file > _GITHUB_LIMIT:
        typer.echo(f"One file has {summary.largest_file / 1e6:,.0f} MB; GitHub Pages takes files up to 100 MB.")
    typer.echo(f"Look at it: python -m http.server --directory {out}. Publish it: bifocal push {out} organisation/name")
