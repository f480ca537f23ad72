"""Build the documentation: `make docs`. Fails if a link, an anchor, a page or a docstring is wrong.

The pages of docs/ and the generated references go to build/docs/pages, the site to build/docs/site. Nothing is loaded
from another host, neither by the build nor by the site.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from references import command_page, recipe_page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "docs"


def stage() -> None:
    """Copy the pages and write the generated ones."""
    for name in ("pages", "site", ".cache"):  # what an earlier build made
        shutil.rmtree(OUT / name, ignore_errors=True)
    pages = OUT / "pages"
    shutil.copytree(HERE.parent, pages, ignore=shutil.ignore_patterns("site"))
    (pages / "assets").mkdir()
    shutil.copy(HERE / "extra.css", pages / "assets")
    for name in ("CONTRIBUTING", "CHANGELOG"):
        shutil.copy(ROOT / f"{name}.md", pages / f"{name.lower()}.md")
    shutil.copy(HERE / "zensical.toml", OUT)
    (pages / "reference" / "commands.md").write_text(command_page(), encoding="utf-8")
    (pages / "reference" / "recipes.md").write_text(recipe_page(), encoding="utf-8")


def foreign_hosts() -> set[str]:
    """Return the scripts, styles and images that the pages would load from other hosts."""
    loads = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(https?://[^"]*)"')
    return {url for page in (OUT / "site").rglob("*.html") for url in loads.findall(page.read_text(encoding="utf-8"))}


def build() -> int:
    """Run Zensical, and return 1 if it or the reader of docstrings complains."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "zensical.toml"]
    done = subprocess.run(
        command, cwd=OUT, env={**os.environ, "PYTHONPATH": str(HERE)}, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    complaints = [line for line in done.stdout.splitlines() if line.startswith("griffe:")]
    if done.returncode or complaints:
        print(done.stdout)
        print(f"The documentation has {len(complaints)} wrong docstrings." if complaints else "The build failed.")
        return 1
    foreign = foreign_hosts()
    if foreign:
        print(f"The site loads from other hosts: {', '.join(sorted(foreign))}.")
        return 1
    print(f"The documentation is in {OUT / 'site' / 'index.html'}")
    return 0


if __name__ == "__main__":
    stage()
    sys.exit(build())
