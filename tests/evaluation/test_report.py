"""The report, opened in a real browser: figures visible, nothing asked for over the network, no error."""

import pytest
from datasets import Dataset
from PIL import Image

from bifocal.demo.report import Gallery, Hit, Item, Report, Search, Stage, write_report
from bifocal.demo.results import evaluate_symbols, example_searches
from bifocal.evaluation.retrieval import relevant_ranks
from tests.browser import LONG_NAME, check_layout, needs_browser, odd_images, opened


def example() -> Report:
    image = Item("black star", Image.new("RGB", (32, 32), "black"), "★")
    other = Item("white star", Image.new("RGB", (32, 32), "white"), "☆")
    found = Search(Item("a star <b>& more</b>"), [Hit(image, 0.91, True), Hit(other, 0.5, False)], image, 1)
    missed = Search(Item(None, Image.new("RGB", (32, 32)), "★"), [Hit(Item("omega"), 0.4, False)], Item("star"), 17)
    stages = [
        Stage(f"{number}: a stage", 20, 3.4, {"R@5": 0.1 * number, "R@1": 0.05},
              {"image-text": [(10, 4.0), (20, 2.0 / number)]}, {"text to image": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]})
        for number in (1, 2, 3)
    ]  # fmt: skip
    odd = [Item(LONG_NAME, image, name) for name, image in odd_images().items()]
    strange = [Search(item, [Hit(other, 0.5, other is item) for other in odd], item, 1) for item in odd]
    galleries = [
        Gallery("Images found", "Drawn at random.", [found]), Gallery("Names found", "Too.", [missed]),
        Gallery(LONG_NAME, LONG_NAME, strange),
    ]  # fmt: skip
    return Report("A report", "What it is about.", {"Recall@5": "0.71"}, stages, galleries, {"seed": "0"})


@pytest.fixture
def page_file(tmp_path):
    path = tmp_path / "report.html"
    write_report(example(), path)
    return path


def test_nothing_is_outside_the_page(page_file):
    text = page_file.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "a star &lt;b&gt;&amp; more&lt;/b&gt;" in text, "texts are escaped"


@needs_browser
def test_in_a_browser(page_file):
    with opened(page_file) as page:
        assert page.title() == "A report"
        assert page.locator("h1").inner_text() == "A report"
        assert page.locator("img").count() == 2 + 2 + 1 + len(odd_images()) * (1 + len(odd_images()))
        assert page.locator(".figures strong").inner_text() == "0.71"
        assert page.locator("tbody tr").count() == 3
        assert "0.300" in page.locator("tbody tr").nth(2).inner_text()
        assert page.locator(".hit.right").count() == 1 + len(odd_images())
        missed = page.locator(".hit.answer")
        assert missed.count() == 1
        assert "star" in missed.inner_text()
        assert "right answer at rank 17" in page.locator("main").inner_text()
        # The check itself: images as high as before and as wide as they come run over their cards.
        style = page.add_style_tag(content=".hit img { width: auto; max-width: none; }")
        with pytest.raises(AssertionError, match=r"leaves its DIV\.hit"):
            check_layout(page)
        style.evaluate("style => style.remove()")


def test_symbols_that_look_alike_are_right_answers_of_each_other(model):
    """As Latin A and Greek Alpha; what the demo measures and shows."""
    images = [Image.new("RGB", (32, 32), (40 * number, 90, 200)) for number in range(5)]
    names = [f"star {number}" for number in range(6)]
    symbols = Dataset.from_dict({
        "images": [[image] for image in [*images, images[-1]]], "name": names, "symbol": list("abcdef"),
        "long_captions": [[f"a long {name}"] for name in names], "descriptions": [[f"a sign {n}"] for n in range(6)],
    })  # fmt: skip
    found = evaluate_symbols(model, symbols)
    alike = [[0], [1], [2], [3], [4, 5], [4, 5]]
    for query, item in (("name", "image"), ("image", "name"), ("long caption", "image")):
        expected = relevant_ranks(found.vectors[query], found.vectors[item], alike)[:, 0]
        assert found.ranks(query, item).tolist() == expected.tolist()
    assert found.metrics["text to image R@1"] == (found.ranks("name", "image") == 1).mean()
    galleries = example_searches(found, symbols, 0)
    assert "2 symbols look like another one to the pixel" in galleries[0].note
    assert "look like" not in galleries[3].note, "names and descriptions differ"
