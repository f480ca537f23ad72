"""The symbols data set: images, texts, split, cache."""

import random
import unicodedata

import numpy as np
import pytest

from bifocal.data import symbol_texts
from bifocal.data.symbols import FACES, SymbolsConfig, build_symbols, covered_symbols, draw, font_files, random_shift
from bifocal.training.tokenizer import train_wordpiece

SMALL = SymbolsConfig(image_size=32, test_symbols=30, validation_symbols=20, limit=120)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def symbols(cache):
    return build_symbols(SMALL, cache)


def test_the_fonts_hold_thousands_of_symbols():
    fonts = font_files()
    assert list(fonts) == list(FACES)
    sans = covered_symbols(fonts["DejaVuSans"])
    assert len(sans) > 5500
    assert {"A", "ω", "★", "⠓", "∮", "ش"} <= sans
    assert not {" ", "\n", "\u200b", "\u00ad"} & sans
    everything = set().union(*map(covered_symbols, fonts.values()))
    assert len(everything) > 6600


def test_drawing():
    fonts = font_files()
    assert draw("⠀", fonts["DejaVuSans"], 32) is None, "a blank braille cell has no ink"
    for symbol in "A★﷽🂡Ẫ█":
        for face in ("DejaVuSans", "DejaVuSans-Bold"):
            if symbol not in covered_symbols(fonts[face]):
                continue
            image = draw(symbol, fonts[face], 32)
            assert image.size == (32, 32)
            ink = np.asarray(image) < 128
            assert ink.any()
    comma, apostrophe = (np.asarray(draw(symbol, fonts["DejaVuSans"], 48)) < 128 for symbol in ",'")
    assert np.nonzero(comma)[0].mean() > np.nonzero(apostrophe)[0].mean() + 10, "one baseline for all"
    left, right = (np.asarray(draw(symbol, fonts["DejaVuSans"], 48)) < 128 for symbol in "⠁⠈")
    assert np.nonzero(left)[1].mean() < np.nonzero(right)[1].mean() - 5, "dot 1 is left of dot 4"
    large = np.asarray(draw("Ẫ", fonts["DejaVuSans"], 32)) < 128
    assert not large[0].all()
    assert not large[-1].any()


def test_a_shift_moves_and_loses_nothing():
    image = draw("★", font_files()["DejaVuSans"], 32).convert("RGB")
    generator = random.Random(0)
    moved = [np.asarray(random_shift(image, generator, 2)) for _ in range(20)]
    assert len({array.tobytes() for array in moved}) > 5
    assert len({(array < 128).sum() for array in moved}) == 1
    assert all((array[0] == 255).all() for array in moved)


def test_splits_and_features(symbols):
    assert {split: len(rows) for split, rows in symbols.items()} == {"test": 30, "validation": 20, "train": 70}
    seen = [set(rows["symbol"]) for rows in symbols.values()]
    assert len(set.union(*seen)) == sum(len(part) for part in seen)
    row = symbols["train"][0]
    assert len(row["images"]) == len(row["faces"]) >= 1
    assert row["images"][0].size == (32, 32)
    assert row["codepoint"] == ord(row["symbol"])
    assert row["name"] == symbol_texts.plain_name(row["symbol"])
    assert len(row["long_captions"]) == len(row["descriptions"]) == 4
    assert all(row["name"] in caption for caption in row["long_captions"])
    assert symbols["train"].features["images"].feature.__class__.__name__ == "Image"


def test_negatives_are_other_names_of_the_same_split(symbols):
    for rows in symbols.values():
        names = set(rows["name"])
        for name, negatives in zip(rows["name"], rows["negatives"], strict=True):
            assert len(set(negatives)) == 7
            assert set(negatives) <= names - {name}


def test_negatives_are_the_most_confusable():
    names = ["greek small letter alpha", "greek small letter beta", "black star", "white star", "latin letter a"]
    names += ["greek small letter alpha with tonos"]
    nearest = [others[0] for others in symbol_texts.confusable_names(names, 2)]
    assert nearest[0] == "greek small letter alpha with tonos"
    assert nearest[2:4] == ["white star", "black star"]


def test_training_never_hears_of_a_held_out_symbol():
    full = build_rows_of_letters()
    hidden = frozenset("É")
    said = symbol_texts.facts("é")
    assert any("latin capital letter e with acute" in fact for fact in said)
    assert not any("latin capital letter e with acute" in fact for fact in symbol_texts.facts("é", hidden))
    assert not any("latin small letter e and" in fact for fact in symbol_texts.facts("é", frozenset("e")))
    names = {symbol_texts.plain_name(symbol) for symbol in full["held out"]}
    for caption in full["captions"]:
        sentences = caption.rstrip(".").split(". ")[1:]
        for sentence in sentences:
            mentioned = sentence.partition(" form is ")[2]
            assert mentioned not in names


def build_rows_of_letters() -> dict[str, list[str]]:
    letters = [chr(code) for code in range(0xC0, 0x180) if unicodedata.category(chr(code))[0] == "L"]
    held_out = frozenset(letters[::2])
    generator = random.Random(0)
    captions = [symbol_texts.long_caption(letter, generator, held_out) for letter in letters[1::2]]
    return {"held out": sorted(held_out), "captions": captions}


def test_names_and_descriptions():
    assert symbol_texts.plain_name("é") == "latin small letter e with acute"
    assert symbol_texts.plain_name("⠓") == "braille pattern dots 1 2 5"
    assert symbol_texts.plain_name("🁀") == "domino tile horizontal 02 01"
    known = symbol_texts.facts("½")
    assert "it is a number sign" in known
    assert "its value is 1/2" in known
    assert "it is the fraction of digit one and fraction slash and digit two" in known
    assert "it is written from right to left" in symbol_texts.facts("ش")
    assert "it turns around in text from right to left" in symbol_texts.facts("(")
    assert "it combines with the letter before it below" in symbol_texts.facts("\u0323")
    generator = random.Random(0)
    descriptions = [symbol_texts.describe("é", generator) for _ in range(20)]
    assert len(set(descriptions)) > 15
    assert sum("latin small letter e with acute" in text for text in descriptions) == 0


def test_same_seed_same_data(symbols, cache, tmp_path):
    again = build_symbols(SMALL, tmp_path)
    for split in symbols:
        for column in ("symbol", "faces", "long_captions", "descriptions", "negatives"):
            assert again[split][column] == symbols[split][column]
        assert [i.tobytes() for i in again[split][0]["images"]] == [i.tobytes() for i in symbols[split][0]["images"]]
    other = build_symbols(SymbolsConfig(**{**vars(SMALL), "seed": 1}), cache)
    assert set(other["test"]["symbol"]) != set(symbols["test"]["symbol"])


def test_the_cache_is_used(symbols, cache, monkeypatch):
    monkeypatch.setattr("bifocal.data.symbols.draw", lambda *_: pytest.fail("drawn again"))
    assert build_symbols(SMALL, cache)["test"]["symbol"] == symbols["test"]["symbol"]
    assert not [path for path in cache.iterdir() if not (path / "dataset_dict.json").exists()], "nothing half made"


def test_too_few_symbols(tmp_path):
    with pytest.raises(ValueError, match="There are 60 symbols, too few for 30 in test, 30 in validation"):
        build_symbols(SymbolsConfig(image_size=32, limit=60, test_symbols=30, validation_symbols=30), tmp_path)


def test_tokenizer(symbols):
    texts = [text for texts in symbols["train"]["long_captions"] for text in texts]
    tokenizer = train_wordpiece(texts, 400, max_length=64)
    assert len(tokenizer) <= 400
    assert tokenizer.model_max_length == 64
    assert tokenizer.pad_token_id == 0
    assert tokenizer("Latin LETTER").input_ids == tokenizer("latin letter").input_ids
    ids = tokenizer("latin small letter").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "latin small letter"
    assert train_wordpiece(texts, 400, max_length=64).get_vocab() == tokenizer.get_vocab()
