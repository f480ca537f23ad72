"""Tokenizers trained on one's own texts, for towers trained from scratch."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import UnigramTrainer, WordPieceTrainer
from transformers import BertTokenizer, PreTrainedTokenizerFast

_BEFORE, _AFTER = ("<s>", "<pad>", "</s>", "<unk>"), ("<mask>",)  # XLM-R's special tokens: the first ids, and the last
_STEP = 1e-4  # by which the trainer's scores of rare characters differ
_DIGITS = 3  # of a piece's log-probability; the trainer's sums differ in the last ones from process to process


def train_wordpiece(texts: Iterable[str], vocab_size: int, max_length: int) -> BertTokenizer:
    """Train an uncased WordPiece tokenizer (the `tokenizers` library) with BERT's special tokens and pre-tokenization.

    The result is a function of the texts alone.

    Args:
        texts: texts to train on.
        vocab_size: largest number of tokens, special tokens included.
        max_length: the tokenizer's `model_max_length`.
    """
    texts = list(texts)
    empty = BertTokenizer(do_lower_case=True)
    backend = empty.backend_tokenizer
    inside: set[str] = set()
    for chunk in {chunk for text in texts for chunk in text.split()}:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(chunk)):
            inside.update(word[1:])
    # The trainer numbers the letters inside words in the order of a hash table, which differs from process to process,
    # and breaks ties between merges by these numbers. Special tokens are numbered in the order of their list.
    special_tokens = [
        *sorted(empty.get_vocab(), key=empty.get_vocab().__getitem__),
        *(f"##{letter}" for letter in sorted(inside)),
    ]
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator(texts, trainer=trainer)
    numbers = backend.get_vocab()
    vocabulary = {piece: numbers[piece] for piece in sorted(numbers, key=numbers.__getitem__)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=max_length)


def train_unigram(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a cased Unigram tokenizer (the `tokenizers` library) with XLM-R's special tokens and pre-tokenization.

    It needs no spaces between words, so it suits any language. Texts are normalised to Unicode's NFKC. The most
    frequent characters are tokens and fill at most half of the vocabulary; others are unknown.

    The result is a function of the texts alone.

    Args:
        texts: texts to train on.
        vocab_size: largest number of tokens, special tokens included.
        max_length: the tokenizer's `model_max_length`.
    """
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    normalised = [backend.normalizer.normalize_str(text) for text in texts]
    characters = Counter("".join(normalised))
    frequent = sorted(characters, key=lambda character: (-characters[character], character))[: vocab_size // 2]
    rare = dict.fromkeys(map(ord, characters.keys() - set(frequent)), " ")
    pieces = vocab_size - len(_BEFORE) - len(_AFTER)
    backend.train_from_iterator(
        (text.translate(rare) for text in normalised),
        trainer=UnigramTrainer(vocab_size=pieces + 1, unk_token="<unk>", show_progress=False),
    )
    trained = _in_order(json.loads(backend.to_str())["model"]["vocab"])[:pieces]
    vocabulary = [*((token, 0.0) for token in _BEFORE), *trained, *((token, 0.0) for token in _AFTER)]
    backend.model = models.Unigram(vocabulary, unk_id=_BEFORE.index("<unk>"))
    ends = [(token, _BEFORE.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=max_length, bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", unk_token="<unk>", pad_token="<pad>", mask_token="<mask>",
    )  # fmt: skip


def _in_order(vocabulary: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return the pieces of a trained Unigram model with their log-probabilities, single characters first.

    The trainer gives the rarest characters scores from the lowest one on, a step apart, in the order of a hash table.
    They get the lowest.
    """
    pieces = {piece: score for piece, score in vocabulary if piece != "<unk>"}
    lowest = min(pieces.values())
    rarest = lowest + _STEP * sum(len(piece) == 1 for piece in pieces)
    scores = {p: round(lowest if len(p) == 1 and s <= rarest else s, _DIGITS) for p, s in pieces.items()}
    return sorted(scores.items(), key=lambda item: (len(item[0]) > 1, -item[1], item[0]))


TOKENIZERS: dict[str, Callable[[Iterable[str], int, int], Any]] = {
    "wordpiece": train_wordpiece,
    "unigram": train_unigram,
}
