"""Tokenizers of every kind that towers come with: the ids, the padding and the limits are those of their own calls."""

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaTokenizer,
)
from transformers.models.siglip2 import Siglip2Tokenizer
from transformers.tokenization_python import PreTrainedTokenizer

from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.modeling.processing_bifocal import image_processor_of_size, private_tokenizer, token_ids
from bifocal.training.tokenizer import train_unigram
from tests.conftest import TEXTS, small_config
from tests.modeling.test_threads import in_threads, meanwhile

LENGTH = 24
WORDS = [
    *TEXTS,
    "ein schwarzer Stern",
    "звезда, чёрная",
    "黒い星の絵",
    "黑色的星星",
    "ดาวสีดำ",
    "نجمة سوداء",
    "काला तारा",
]
MIXED = [
    "", " ", "star", "  black   star ", "black\nstar\tomega", *WORDS, "Ⅷ ﬁne Ｆｕｌｌ e\u0301", "☃ 𠮷 👩‍🚀",
    "<s> black </s> <mask> x<pad>", "[CLS] black [SEP] [MASK]x", "<|endoftext|> black <|startoftext|>x",
    "<bos>a<eos> b", " ".join(WORDS), "黒い星の絵" * 20,
]  # fmt: skip


class Characters(PreTrainedTokenizer):
    """A tokenizer written in Python, as those of some languages are: each character is a token."""

    vocab_files_names: dict[str, str] = {}

    def __init__(self, **kwargs: Any) -> None:
        special = {"cls_token": "<c>", "sep_token": "<e>", "pad_token": "<p>", "unk_token": "<u>"}
        self.numbers = {token: number for number, token in enumerate([*special.values(), *map(chr, range(33, 127))])}
        super().__init__(**{**special, **kwargs})

    vocab_size = property(lambda self: len(self.numbers))

    def get_vocab(self) -> dict[str, int]:
        return dict(self.numbers)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [letter for letter in text if not letter.isspace()]

    def _convert_token_to_id(self, token: str) -> int:
        return self.numbers.get(token, 3)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.numbers)[index]

    def build_inputs_with_special_tokens(self, ids: list[int], other: list[int] | None = None) -> list[int]:
        return [0, *ids, 1, *([*other, 1] if other else [])]

    def save_vocabulary(self, *_: Any, **__: Any) -> tuple[str, ...]:
        return ()


def _bpe(backend: Tokenizer, special: list[str], **options: Any) -> dict[str, Any]:
    backend.train_from_iterator(
        WORDS * 3, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, **options)
    )
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]], "model_max_length": LENGTH}


def _xlm_r() -> Any:
    trained = json.loads(train_unigram(WORDS * 3, 300, LENGTH).backend_tokenizer.to_str())["model"]["vocab"]
    return XLMRobertaTokenizer(vocab=[tuple(piece) for piece in trained], model_max_length=LENGTH)


def _modern_bert() -> Any:
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.decoder = normalizers.NFC(), decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    _bpe(backend, special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=LENGTH,
        **{f"{token[1:-1].lower()}_token": token for token in special},
    )  # fmt: skip


def _clip() -> Any:
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    rules = CLIPTokenizer().backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    letters = pre_tokenizers.ByteLevel.alphabet()
    ends = ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(**_bpe(backend, ends, initial_alphabet=letters, end_of_word_suffix="</w>"))


def _gemma(kind: Callable[..., Any]) -> Any:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    tokenizer = kind(**_bpe(backend, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *bytes_]))
    tokenizer.add_bos_token = True
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "XLM-R": _xlm_r,
    "ModernBERT": _modern_bert,
    "CLIP": _clip,
    "Gemma": functools.partial(_gemma, GemmaTokenizer),
    "SigLIP 2": functools.partial(_gemma, Siglip2Tokenizer),
    "trained": lambda: train_unigram(WORDS * 3, 300, LENGTH),
}


@pytest.fixture(scope="module")
def make() -> Callable[[str], Any]:
    """Return a tokenizer of a kind; each call has one of its own."""
    import copy

    trained = functools.cache(lambda kind: KINDS[kind]())
    return lambda kind: Characters(model_max_length=LENGTH) if kind == "Python" else copy.deepcopy(trained(kind))


def processor_with(tokenizer: Any) -> BifocalProcessor:
    return BifocalProcessor(image_processor_of_size(32), tokenizer)


def model_with(tokenizer: Any, **text_config: Any) -> BifocalModel:
    torch.manual_seed(0)
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": LENGTH}
    model = BifocalModel(small_config(text_config=words | text_config)).eval()
    model.processor = processor_with(tokenizer)
    return model


@pytest.mark.parametrize("kind", [*KINDS, "Python"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_ids_are_those_of_its_own_call(make, tmp_path, kind, side):
    """Also after saving: with our processor, with AutoTokenizer and with the tokenizers library alone."""
    tokenizer = make(kind)
    tokenizer.truncation_side = side
    whole = [len(ids) for ids in tokenizer(MIXED, verbose=False)["input_ids"]]
    loaded = [tokenizer]
    if kind != "Python":
        processor_with(tokenizer).save_pretrained(tmp_path)
        loaded += [BifocalProcessor.from_pretrained(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)]
        raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode_batch(MIXED)
        assert [text.ids for text in raw] == tokenizer(MIXED, truncation=True)["input_ids"]
    assert max(whole) > LENGTH > min(whole)
    for number, length in itertools.product(range(len(loaded)), (4, 11, LENGTH, 1000)):
        expected = tokenizer(MIXED, truncation=True, max_length=length)["input_ids"]
        ids, lengths = token_ids(private_tokenizer(loaded[number]), MIXED, length)
        assert (ids, lengths) == (expected, whole), f"{number} at {length}"
        assert type(loaded[number]) is type(tokenizer)


@pytest.mark.parametrize("kind", [*KINDS, "Python"])
def test_texts_are_padded_at_the_end(make, tmp_path, kind):
    """Gemma's tokenizer pads at the start, and a text alone and in a batch would have two vectors."""
    processor = processor_with(make(kind))
    sides = [processor]
    if kind != "Python":
        processor.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "right"
        sides.append(BifocalProcessor.from_pretrained(tmp_path))
    for each in sides:
        padded = each(text=MIXED, return_tensors="np")
        assert padded["input_ids"].shape == padded["attention_mask"].shape == (len(MIXED), LENGTH)
        for row, ids in enumerate(token_ids(processor.tokenizer, MIXED, LENGTH)[0]):
            assert padded["input_ids"][row, : len(ids)].tolist() == ids
            assert set(padded["input_ids"][row, len(ids) :]) <= {processor.tokenizer.pad_token_id}
            assert padded["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (LENGTH - len(ids))


@pytest.mark.parametrize("kind", [*KINDS, "Python"])
def test_vectors_alone_in_batches_and_in_threads(make, kind):
    """Also while another thread switches truncation and padding."""
    model = model_with(make(kind))
    alone = np.stack([model.encode_text(text) for text in MIXED])
    assert np.isfinite(alone).all()
    tokenizer = model.processor.tokenizer
    switched = itertools.cycle(({"truncation": True, "max_length": 5}, {"padding": True}))
    with meanwhile(lambda: tokenizer(MIXED, **next(switched), verbose=False)):
        results = in_threads([functools.partial(model.encode_text, MIXED, batch_size=size) for size in (1, 3, 32)], 9)
    for vectors in itertools.chain(*results):
        np.testing.assert_allclose(vectors, alone, atol=2e-6)
    inputs = model.processor(text=MIXED, return_tensors="pt")
    with torch.no_grad():
        together = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    np.testing.assert_allclose(together, alone, atol=2e-6)
