"""The command `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import cannot_write, fail, require


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a killed run there goes on.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order of the batches.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; too short to learn much.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start anew where a run is already.")] = False,
) -> None:
    """Train a small model through the three stages, search with it and write a report."""
    require("accelerate", "datasets", "fontTools", "jinja2", "matplotlib", "sentence_transformers")
    from bifocal.demo.runner import DemoError, full_settings, quick_settings, run_demo
    from bifocal.files import NotOursError

    try:
        run_demo(out, quick_settings(seed) if quick else full_settings(seed), force)
    except (DemoError, NotOursError) as error:
        fail(str(error))
    except Exception as error:
        if not cannot_write(error, out):
            raise
        fail(f"Cannot write to {out} ({error}); free space or choose another --out. The run goes on from there.")
