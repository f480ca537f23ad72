"""Trained tokenizers: the rules of BERT's and XLM-R's, and the same in every process."""

import json
import unicodedata

import pytest
from transformers import AutoTokenizer, BertTokenizer

from bifocal.training.tokenizer import train_unigram, train_wordpiece
from tests.processes import run

TEXTS = [
    "Latin small letter a with acute",
    "latin SMALL letter é with grave",
    "black star, white star",
    "starlight",
] * 5


def test_it_is_berts():
    tokenizer = train_wordpiece(TEXTS, 200, max_length=8)
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer.tokenize("LATIN Star") == ["latin", "star"]
    assert tokenizer.tokenize("é") == ["e"]
    ids = tokenizer("black star", truncation=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "black", "star", "[SEP]"]
    assert tokenizer.pad_token_id == 0
    assert sorted(tokenizer.all_special_tokens) == ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UNK]"]
    assert tokenizer.model_max_length == 8
    assert len(tokenizer("star " * 20, truncation=True)["input_ids"]) == 8
    assert tokenizer.tokenize("start") == ["star", "##t"]
    assert "##t" not in tokenizer.all_special_tokens


def test_the_vocabulary_has_at_most_the_size_asked_for():
    assert len(train_wordpiece(TEXTS, 60, max_length=8)) <= 60


def test_it_is_the_same_in_every_process():
    """The tokenizers library alone numbers pieces in the order of a hash table that differs from process to process."""
    code = f"""
import json
from bifocal.training.tokenizer import train_wordpiece
print(json.dumps(train_wordpiece({TEXTS!r}, 90, max_length=8).get_vocab(), sort_keys=True))
"""
    vocabularies = [json.loads(run("-c", code).stdout) for _ in range(3)]
    assert vocabularies == [train_wordpiece(TEXTS, 90, max_length=8).get_vocab()] * 3


LANGUAGES = ["black star, white star", "schwarzer Stern", "黒い星の絵", "黑色的星星", "ดาวสีดำ", "نجمة سوداء"] * 5


def test_a_unigram_tokenizer_is_like_xlm_rs(tmp_path):
    tokenizer = train_unigram(LANGUAGES, 200, max_length=16)
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": len(tokenizer) - 1}
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(special.values())
    assert set(tokenizer.all_special_ids) == set(special.values())
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (
        0, 2, 1, special["<mask>"],
    )  # fmt: skip
    assert tokenizer("", "a")["input_ids"][:3] == [0, 2, 2], "a pair has XLM-R's three ends"
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.model_max_length == 16
        for text in LANGUAGES[:6]:
            ids = each(text)["input_ids"]
            assert (ids[0], ids[-1]) == (0, 2)
            assert 3 not in ids
            assert each.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFKC", text)
        assert each("ｂｌａｃｋ\u3000star")["input_ids"] == each("black star")["input_ids"], "NFKC"
        assert each("Black")["input_ids"] != each("black")["input_ids"]


def test_unigram_pieces_need_no_spaces():
    colours, things = ("黒い", "白い", "赤い", "青い"), ("星の絵", "車の絵", "花の絵", "家の絵")
    tokenizer = train_unigram([colour + thing for colour in colours for thing in things], 100, max_length=16)
    assert len(tokenizer.tokenize("白い花の絵")) < len("白い花の絵")


@pytest.mark.parametrize("size", [100, 107, 150, 3000])
def test_a_unigram_vocabulary_has_at_most_the_size_asked_for(size):
    """Characters take at most half of it, the most frequent ones; others are unknown."""
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 120)))
    texts = [letters, letters[:70] * 2, *LANGUAGES]
    tokenizer = train_unigram(texts, size, max_length=300)
    pieces = [piece for piece in tokenizer.get_vocab() if piece not in tokenizer.all_special_tokens]
    assert len(tokenizer) <= size
    assert sum(len(piece) == 1 for piece in pieces) <= size // 2 + 1, "the mark of a space is one more"
    unknown = tokenizer(letters)["input_ids"].count(tokenizer.unk_token_id)
    assert bool(unknown) == (size < 300)
    assert tokenizer.unk_token_id not in tokenizer("star")["input_ids"]


def test_a_unigram_tokenizer_is_the_same_in_every_process():
    code = f"""
from bifocal.training.tokenizer import train_unigram
print(train_unigram({[*TEXTS, *LANGUAGES]!r}, 150, max_length=8).backend_tokenizer.to_str())
"""
    expected = train_unigram([*TEXTS, *LANGUAGES], 150, max_length=8).backend_tokenizer.to_str()
    assert [run("-c", code, TOKENIZERS_PARALLELISM=on).stdout.strip() for on in ("true", "false")] == [expected] * 2
