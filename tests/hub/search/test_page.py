"""The page as visitors see it: a real server and a real browser."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from bifocal.embedding.items import thumbnail
from bifocal.hub.search.hits import Hit
from bifocal.hub.search.page import MAX_UPLOAD_SIZE, results_html, search_function
from bifocal.hub.search.searcher import MAX_QUERY_LENGTH
from tests.browser import CHROMIUM, needs_browser
from tests.hub.search.conftest import sample_items
from tests.hub.search.serving import EVIL

ROOT = Path(__file__).parents[3]


@pytest.fixture
def page(served):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1200, "height": 900})
        requests, problems = [], []
        opened.on("request", lambda request: requests.append(request.url))
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        opened.goto(served.address)
        opened.wait_for_selector("#bf-go")
        yield opened
        browser.close()
    assert problems == []
    assert [url for url in requests if not url.startswith((served.address, "data:", "blob:"))] == []


@needs_browser
def test_clicked_through(page, tmp_path):
    from playwright.sync_api import expect

    results = page.locator("#bf-results")
    expect(page.get_by_role("heading", name="Shapes")).to_be_visible()
    expect(results).to_contain_text("Nothing searched yet. There are 64 images and 65 texts.")
    page.click("#bf-go")
    expect(results.get_by_role("alert")).to_have_text("Enter a text, an image or both.")

    text = page.get_by_label("Text", exact=True)
    text.fill("a blue star on paper")
    text.press("Enter")
    expect(results.locator(".bf-hit")).to_have_count(12)
    expect(results.locator(".bf-text p").first).to_have_text("a blue star on paper")

    page.get_by_label("Two rankings").check()
    page.click("#bf-go")
    expect(results.locator("h2")).to_have_text(["Images", "Texts"])
    expect(results.locator(".bf-hit")).to_have_count(24)
    expect(results.locator(".bf-image img")).to_have_count(12)

    # By image: the uploaded one itself comes first, whatever the text was.
    page.click("#bf-clear")
    expect(text).to_have_value("")
    (tmp_path / "query.png").write_bytes(dict(_image_files())["drawings/10.png"])
    page.get_by_label("Images only").check()
    page.set_input_files("#bf-query-image input[type=file]", tmp_path / "query.png")
    expect(results.locator(".bf-hit small").first).to_have_text("10.png")
    expect(results.locator(".bf-score").first).to_contain_text("1.000")
    text.fill("a black cross")
    page.get_by_label("Weight of the text against the image").first.fill("1")
    page.click("#bf-go")
    expect(results.locator(".bf-score").first).not_to_contain_text("1.000")


@needs_browser
def test_with_the_keyboard_alone_and_on_a_phone(page):
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 390, "height": 800})
    page.keyboard.type("a red ring")  # the text has the focus from the start
    page.keyboard.press("Enter")
    hits = page.locator("#bf-results .bf-hit")
    expect(hits).to_have_count(12)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "bf-go":
            break
    else:
        raise AssertionError("Search cannot be reached with the keyboard")
    page.keyboard.press("Enter")
    expect(hits).to_have_count(12)
    hits.first.focus()
    assert page.evaluate("document.activeElement.className").startswith("bf-hit")


@needs_browser
def test_broken_and_large_uploads_and_what_is_not_html(page, tmp_path):
    from playwright.sync_api import expect

    results = page.locator("#bf-results")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no image")
    page.set_input_files("#bf-query-image input[type=file]", tmp_path / "broken.png")
    expect(results.get_by_role("alert")).to_contain_text("The image cannot be used: it cannot be read as an image")
    page.click("#bf-clear")
    expect(results).to_contain_text("Nothing searched yet.")  # or it would take the next image with it
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + os.urandom(MAX_UPLOAD_SIZE + 1))
    page.set_input_files("#bf-query-image input[type=file]", tmp_path / "large.png")
    expect(page.get_by_text("exceed the maximum allowed size of 10").first).to_be_visible(timeout=30_000)
    page.reload()
    page.wait_for_selector("#bf-go")
    page.get_by_label("Text", exact=True).fill(EVIL)
    page.keyboard.press("Enter")
    expect(results.locator(".bf-hit")).to_have_count(12)
    expect(results.locator(".bf-hit p", has_text="onerror")).to_have_text(EVIL)


def _image_files() -> list[tuple[str, bytes]]:
    return [(item.name, item.image) for item in sample_items() if isinstance(item.image, bytes)]


@needs_browser
def test_no_image_leaves_its_card(page):
    sizes = [(2000, 6), (6, 2000), (1, 1), (300, 300), (17, 11), (640, 480)]
    hits = [
        Hit(f"{'name' * 20}{number}.png", "image", "", 0.5, 0.5, thumbnail(Image.new("RGB", size, "white")))
        for number, size in enumerate(sizes)
    ]
    script = "html => document.querySelector('#bf-results .bf-note').parentElement.innerHTML = html"
    page.wait_for_selector("#bf-results .bf-note")  # drawn after the button
    page.evaluate(script, results_html({"": hits}))
    for width in (390, 800, 1400):
        page.set_viewport_size({"width": width, "height": 900})
        boxes = page.evaluate(
            """async () => {
                const shown = [...document.querySelectorAll('#bf-results .bf-hit img')];
                await Promise.all(shown.map(image => image.decode()));
                const box = element => element.getBoundingClientRect().toJSON();
                return shown.map(image => [box(image), box(image.closest('.bf-hit'))]);
            }"""
        )
        assert len(boxes) == len(sizes)
        for image, card in boxes:
            assert card["left"] <= image["left"] < image["right"] <= card["right"]
            assert card["top"] <= image["top"] < image["bottom"] <= card["bottom"]
            assert min(image["width"], image["height"]) >= 8, "also an image of one pixel can be seen"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    edges = page.locator("#bf-results .bf-hit img").evaluate_all("all => all.map(i => getComputedStyle(i).borderTop)")
    assert all(edge.startswith("1px solid") for edge in edges), "white images have an edge"


def test_what_the_page_answers(searcher, tmp_path):
    find = search_function(searcher)
    assert 'role="alert"' in find("x", None, "Sideways", 5, 0.5)
    assert "its first 20,000 characters were used" in find("word " * MAX_QUERY_LENGTH, None, "Texts only", 3, 0.5)
    assert find("a star", None, "Images only", 1000, 7).count("<li") == 60
    assert "1 hit<" in find("a star", None, "Images only", 1, 0.5)
    large = tmp_path / "large.png"
    large.write_bytes(bytes(MAX_UPLOAD_SIZE + 1))
    assert "The image is larger than 10 MiB" in find("", str(large), "Two rankings", 5, 0.5)
    assert "The image was deleted. Upload it again." in find("", str(tmp_path / "gone.png"), "Two rankings", 5, 0.5)
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    assert "9000 x 9000 pixels, more than" in find("", str(tmp_path / "bomb.png"), "Two rankings", 5, 0.5)
    assert results_html({"text": []}).count("The index has none of this kind") == 1
    part = searcher.index.table.parts[0]
    part.unlink()  # not cut: it is mapped into this process's memory
    part.write_bytes(b"damaged")
    shown = find("a star", None, "Two rankings", 3, 0.5)
    assert "The index cannot be searched now" in shown
    assert str(tmp_path) not in shown, "what is wrong on the server is not told to visitors"
