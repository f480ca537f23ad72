"""The published figures: each has a source, stands under one protocol, and is shown on the page."""

from pathlib import Path

import pytest
import yaml

import bifocal.evaluation
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.report import write_evaluation_page
from tests.browser import needs_browser, opened

TABLES = yaml.safe_load((Path(bifocal.evaluation.__file__).parent / "published.yaml").read_text(encoding="utf-8"))
ROWS = [(table, row) for table in TABLES for row in table["models"]]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "report.html"
    measured = Result("scores", "sts", "spearman", {"spearman": 0.5}, {"pairs": 3})
    write_evaluation_page({"ours": [measured]}, path, "Evaluation")
    return path


def test_tables_are_complete():
    for table in TABLES:
        assert list(table) == ["title", "protocol", "decimals", "columns", "models"]
        assert table["title"]
        assert not table["protocol"].endswith("."), "the page adds it"
        assert len(set(table["columns"])) == len(table["columns"])
        names = [row["name"] for row in table["models"]]
        assert len(set(names)) == len(names), f"a model is twice in '{table['title']}'"
    assert len({table["title"] for table in TABLES}) == len(TABLES)
    assert len({table["protocol"] for table in TABLES}) == len(TABLES), "one protocol, one table"


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{table['title']}-{row['name']}" for table, row in ROWS])
def test_a_row_has_a_source_and_a_figure_for_each_column(table, row):
    assert list(row) == ["name", "values", "source"]
    assert row["source"].strip()
    assert "http" not in row["source"], "the page links to nothing"
    assert len(row["values"]) == len(table["columns"])
    if "in per cent" not in table["protocol"]:
        assert all(0 < value < 1 for value in row["values"])
    elif not row["name"].startswith("its gain"):
        assert all(10 < value < 100 for value in row["values"])


def test_long_clip_and_jina_clip_v2_are_among_them():
    names = [row["name"] for _, row in ROWS]
    assert sum(name.startswith("Long-CLIP") for name in names) >= 5
    assert "jina-clip-v2" in names


def test_a_figure_in_two_tables_is_the_same():
    """Recall@5 of text to image stands as a fraction beside the other direction, and in per cent beside languages."""
    retrieval, languages = ({row["name"]: row["values"] for row in TABLES[number]["models"]} for number in (0, 2))
    both = retrieval.keys() & languages.keys()
    assert both == {"NLLB-CLIP large (SigLIP)"}
    for name in both:
        flickr, _, coco, _ = retrieval[name]
        assert [100 * flickr, 100 * coco] == pytest.approx(languages[name][:2])


@needs_browser
def test_the_page_shows_them(page_file):
    with opened(page_file) as page:
        section = page.locator("section", has_text="Published results")
        shown = [
            table.locator("tr").evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
            for table in section.locator("table").all()
        ]
        protocols = section.locator("p.note").all_text_contents()[1:]
    assert protocols == [f"{table['protocol']}." for table in TABLES]
    for table, (head, *rows) in zip(TABLES, shown, strict=True):
        digits = table["decimals"]
        assert head == ["model", *table["columns"], "source"]
        for row, (name, *values, source) in zip(table["models"], rows, strict=True):
            assert (name, source) == (row["name"], row["source"])
            assert [float(value) for value in values] == pytest.approx(row["values"], abs=0.501 * 10**-digits)
            assert all(len(value.partition(".")[2]) == digits for value in values)
