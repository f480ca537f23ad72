"""Build the documentation: `make docs`. Fails if a link, an anchor, a page or a docstring is wrong.

Pages and generated references are put together in a temporary folder, and the site goes to build/docs/site. Nothing is
loaded from another host, neither by the build nor by the site.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from references import command_page, recipe_page

from bifocal.files import NotOursError, replace_folder, require_replaceable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = ROOT / "build" / "docs" / "site"
KIND = "documentation"  # in the site's list of files


def stage(folder: Path) -> None:
    """Copy the pages into a folder and write the generated ones."""
    pages = folder / "pages"
    shutil.copytree(HERE.parent, pages, ignore=shutil.ignore_patterns("site"))
    (pages / "assets").mkdir()
    shutil.copy(HERE / "extra.css", pages / "assets")
    for name in ("CONTRIBUTING", "CHANGELOG"):
        shutil.copy(ROOT / f"{name}.md", pages / f"{name.lower()}.md")
    shutil.copy(HERE / "zensical.toml", folder)
    (pages / "reference" / "commands.md").write_text(command_page(), encoding="utf-8")
    (pages / "reference" / "recipes.md").write_text(recipe_page(), encoding="utf-8")


def foreign_hosts(site: Path) -> set[str]:
    """Return the scripts, styles and images that the pages would load from other hosts."""
    loads = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(https?://[^"]*)"')
    return {url for page in site.rglob("*.html") for url in loads.findall(page.read_text(encoding="utf-8"))}


def build(folder: Path) -> int:
    """Run Zensical in a folder and keep its site, or return 1 if it or the reader of docstrings complains."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "zensical.toml"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(HERE)}, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    complaints = [line for line in done.stdout.splitlines() if line.startswith("griffe:")]
    if done.returncode or complaints:
        print(done.stdout)
        print(f"The documentation has {len(complaints)} wrong docstrings." if complaints else "The build failed.")
        return 1
    foreign = foreign_hosts(folder / "site")
    if foreign:
        print(f"The site loads from other hosts: {', '.join(sorted(foreign))}.")
        return 1
    with replace_folder(SITE, KIND) as scratch:  # refuses a site with files of somebody else
        shutil.copytree(folder / "site", scratch, dirs_exist_ok=True)
    print(f"The documentation is in {SITE / 'index.html'}")
    return 0


if __name__ == "__main__":
    try:
        require_replaceable(SITE, KIND)
        with tempfile.TemporaryDirectory() as work:
            stage(Path(work))
            sys.exit(build(Path(work)))
    except NotOursError as error:
        sys.exit(f"Error: {error}")
