"""A page in a real browser: it must show all its images within their cards, fit every window, and ask for nothing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")
WIDTHS = (390, 800, 1400)  # a phone, a small window, a screen

# Every visible image lies within each box around it, keeps its proportions and touches no other image; nothing is wider
# than the window. An element that scrolls sideways may hold wider things.
_LAYOUT = """() => {
  const wrong = [], slack = 1.5;
  const scrolls = element => ["auto", "scroll", "hidden"].includes(getComputedStyle(element).overflowX);
  const about = element => `${element.tagName}.${element.className} ` +
    (element.alt || element.textContent || "").trim().slice(0, 40);
  const within = (inner, outer) => inner.left >= outer.left - slack && inner.right <= outer.right + slack &&
    inner.top >= outer.top - slack && inner.bottom <= outer.bottom + slack;
  const shown = [...document.images].filter(image => image.getBoundingClientRect().width > 0);
  for (const image of shown) {
    const box = image.getBoundingClientRect(), style = getComputedStyle(image);
    for (let outer = image.parentElement; outer && outer !== document.body; outer = outer.parentElement) {
      if (["inline", "contents"].includes(getComputedStyle(outer).display)) continue;
      if (!within(box, outer.getBoundingClientRect())) wrong.push(`${about(image)} leaves its ${about(outer)}`);
      if (scrolls(outer)) break;
    }
    const ratio = (box.width / box.height) / (image.naturalWidth / image.naturalHeight);
    if (style.objectFit === "fill" && Math.min(box.width, box.height) > 12 && Math.abs(Math.log(ratio)) > 0.1)
      wrong.push(`${about(image)} is distorted by ${ratio.toFixed(2)}`);
  }
  const boxes = shown.map(image => image.getBoundingClientRect());
  boxes.forEach((one, i) => boxes.slice(0, i).forEach((other, j) => {
    const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
    const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
    if (across > slack && down > slack) wrong.push(`${about(shown[i])} lies over ${about(shown[j])}`);
  }));
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (!box.width || box.right <= innerWidth + slack && box.left >= -slack) continue;
    let outer = element.parentElement;
    while (outer && outer !== document.body && !scrolls(outer)) outer = outer.parentElement;
    if (!outer || outer === document.body) wrong.push(`${about(element)} is wider than the window`);
  }
  if (document.documentElement.scrollWidth > innerWidth) wrong.push("the page scrolls sideways");
  return wrong.slice(0, 10);
}"""


LONG_NAME = "a_name_of_one_word_as_files_have_it_" * 4 + " and  <b>more</b>"


def odd_images() -> dict[str, Image.Image]:
    """What image collections hold besides squares: wide, tall, tiny and white images."""
    sizes = {"wide": (192, 14), "tall": (14, 192), "tiny": (3, 2), "white": (96, 80), "square": (32, 32)}
    images = {name: Image.new("RGB", size, "white") for name, size in sizes.items()}
    for name, image in images.items():
        if name != "white":
            ImageDraw.Draw(image).line([(0, 0), image.size], fill="black", width=2)
    return images


def check_layout(page: Any, widths: tuple[int, ...] = WIDTHS) -> None:
    """Look at an open page at each width: whole images in their cards, nothing beyond the window."""
    for width in widths:
        page.set_viewport_size({"width": width, "height": 900})
        wrong = page.evaluate(_LAYOUT)
        assert wrong == [], f"at {width} pixels: {wrong}"


@contextmanager
def opened(path: Path) -> Iterator:
    """The page, opened. At the end it is checked for what every page of ours must be, at every width."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTHS[-1], "height": 900})
        problems, requests = [], []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield page
        lacking = page.evaluate(
            "[...document.images].filter(i => !(i.complete && i.naturalWidth && i.alt)).map(i => i.src.slice(0, 80))"
        )
        assert lacking == [], "images that are not shown or have no text in their place"
        check_layout(page)
        browser.close()
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
