"""The command `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import require, writes_into


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a killed run resumes there.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Random seed of the split, the weights and the order of the batches.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; too short to learn much.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing run.")] = False,
) -> None:
    """Train a small model through the three stages, search with it and write a report."""
    require("accelerate", "datasets", "fontTools", "jinja2", "matplotlib", "sentence_transformers")
    from bifocal.demo.run_folder import earlier_settings

    writes_into(out, "free space and run the command again to resume, or choose another --out")
    earlier_settings(out)

    from bifocal.demo.runner import full_settings, quick_settings, run_demo

    run_demo(out, quick_settings(seed) if quick else full_settings(seed), overwrite)
