"""A WordPiece tokenizer trained on one's own texts, for towers trained from scratch."""

from collections.abc import Iterable

from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer


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
