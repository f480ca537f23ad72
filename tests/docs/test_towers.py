"""The tables of docs/towers.md are those of `modeling/towers_bifocal.py`."""

from transformers import CONFIG_MAPPING

from bifocal.modeling.towers_bifocal import TEXT_FAMILIES, VISION_POOLINGS, TextFamily
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "towers.md"
POOLINGS = {"mean": "mean", "class_token": "first token", "last_token": "last token", "pooler": "its own"}


def text_row(name: str, family: TextFamily) -> str:
    padding = "full length" if family.padding == "max_length" else "longest of a batch"
    mask = "yes" if family.attention_mask else "no"
    longest = "position table" + (f" - {family.reserved_positions}" if family.reserved_positions else "")
    prompts = "yes" if family.prompts else "none"
    return f"| {name} | {POOLINGS[family.pooling]} | {padding} | {mask} | {longest} | {prompts} |"


def test_the_table_of_text_towers_is_that_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    rows = [text_row(f"`{kind}`", family) for kind, family in sorted(TEXT_FAMILIES.items())]
    rows.append(text_row("any other", TextFamily()))
    assert (
        page.split("## Text towers")[1].split("| --- | --- | --- | --- | --- | --- |\n")[1].split("\n\n")[0].split("\n")
        == rows
    )
    assert all(kind in CONFIG_MAPPING for kind in TEXT_FAMILIES if not kind.startswith("bifocal"))
    for kind, family in TEXT_FAMILIES.items():
        for prompt, text in family.prompts.items():
            assert f"| `{kind}` | {prompt} | `{text}` |" in page


def test_the_table_of_image_towers_is_that_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    rows = [f"| `{kind}` | {POOLINGS[pooling]} |" for kind, pooling in sorted(VISION_POOLINGS.items())]
    rows.append("| any other | its own |")
    table = page.split("## Image towers")[1].split("| --- | --- |\n")[1].split("\n\n")[0]
    assert table.split("\n") == rows


def test_the_dual_encoders_are_those_of_the_tests():
    """Each of them is compared with its own numbers in tests/modeling/test_families.py."""
    from tests import families

    page = PAGE.read_text(encoding="utf-8")
    table = page.split("## Whole dual encoders")[1].split("## ")[0]
    for name in families.DUAL_ENCODERS:
        assert f"| {name} |" in table
