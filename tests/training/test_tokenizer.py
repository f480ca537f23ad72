"""The trained WordPiece tokenizer: BERT's rules, and the same in every process."""

import json

from transformers import BertTokenizer

from bifocal.training.tokenizer import train_wordpiece
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
