"""Counts the tokens that a model reads of a text."""

from collections.abc import Sequence
from typing import Any

from bifocal.embedding.models import EmbeddingModel
from bifocal.modeling.processing_bifocal import private_tokenizer, token_ids

_UNLIMITED = 2**31


class TokenCounter:
    """The tokenizer of a model, for any number of threads.

    Args:
        model: a dual encoder or a sentence-transformers model.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        inner = model.model
        if model.is_joint:
            tokenizer = inner.processor.tokenizer
            self.limit = min(inner.config.max_text_length, tokenizer.model_max_length)
        else:
            tokenizer = getattr(inner, "tokenizer", None)
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
            self.limit = inner.max_seq_length or _UNLIMITED
        self._tokenizer: Any = tokenizer
        if hasattr(tokenizer, "all_special_ids"):  # of transformers
            self._tokenizer = private_tokenizer(tokenizer)

    @property
    def max_tokens(self) -> int | None:
        """Most tokens that the model reads of a text; None if it reads all."""
        return None if self.limit == _UNLIMITED else self.limit

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of texts, special tokens included, before they are truncated to the limit."""
        if not texts:
            return []
        if hasattr(self._tokenizer, "all_special_ids"):
            return token_ids(self._tokenizer, list(texts), _UNLIMITED)[1]
        if hasattr(self._tokenizer, "encode_batch"):  # of tokenizers
            return [len(encoding) for encoding in self._tokenizer.encode_batch(list(texts))]
        return [len(text.split()) for text in texts]  # a model of word vectors
