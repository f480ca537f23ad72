"""Stage 0 on texts that stream, from files and from what datasets loads; bad rows are skipped."""

import json

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from bifocal.errors import RecipeError
from bifocal.modeling import BifocalProcessor, BifocalTextForMaskedLM
from bifocal.modeling.processing_bifocal import image_processor_of_size, private_tokenizer
from bifocal.training.mlm import WholeWordCollator, separate_words, train_mlm
from bifocal.training.recipe import Recipe
from tests.conftest import TEXTS, small_config
from tests.data.files import lines
from tests.modeling.test_tokenizers import KINDS, WORDS, Characters


def recipe(folder, source: dict, **changes) -> Recipe:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    values = {
        "name": "words", "output_dir": str(folder / "run"), "processor": str(folder / "processor"), "max_length": 32,
        "model": size, "mlm": {"data": {"streaming": True, "max_bad_fraction": 0.2, **source}, "batch_size": 4},
        "training": {"max_steps": 3, "disable_tqdm": True}, **changes,
    }  # fmt: skip
    return Recipe(**values)


def words_of(tokenizer, text: str) -> list[str]:
    """Return what the collator masks together."""
    tokens = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    spans = separate_words(text, tokens["offset_mapping"], tokens["special_tokens_mask"])
    collator = WholeWordCollator(tokenizer, whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0)
    numbers, _ = collator._calc_word_ids_and_prob_mask(np.array([spans]), np.array([tokens["special_tokens_mask"]]))
    words: dict[int, list[int]] = {}
    for number, (first, last) in zip(numbers[0], tokens["offset_mapping"], strict=True):
        if number != -1:
            words.setdefault(int(number), []).extend((first, last))
    assert list(words) == sorted(words)
    return [text[min(ends) : max(ends)].strip() for ends in words.values()]


@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind != "CLIP"), "WordPiece"])
def test_words_of_every_tokenizer(processor, kind):
    """Spans of byte-level and SentencePiece tokenizers touch each other, so that a text was one word."""
    tokenizer = processor.tokenizer if kind == "WordPiece" else KINDS[kind]()
    assert words_of(tokenizer, "black star, heavy omegas") == ["black", "star,", "heavy", "omegas"]
    assert words_of(tokenizer, "") == []
    if kind != "WordPiece":
        words = words_of(tokenizer, "чёрная 星の黒色絵 star")
        assert (words[0], words[-1], "".join(words[1:-1])) == ("чёрная", "star", "星の黒色絵")
        assert len(words) > 3, "where no space separates words, a token is one"
        assert words_of(tokenizer, "x👩y z") == ["x👩y", "z"], "the bytes of a character are one word"


def test_masked_texts_of_a_tokenizer_that_pads_at_the_start():
    tokenizer = private_tokenizer(KINDS["Gemma"]())
    rows = [tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True) for text in TEXTS[:3]]
    for text, row in zip(TEXTS, rows, strict=False):
        row["offset_mapping"] = separate_words(text, row["offset_mapping"], row["special_tokens_mask"])
    options = {"mlm_probability": 0.99, "mask_replace_prob": 1.0, "random_replace_prob": 0.0}
    batch = WholeWordCollator(tokenizer, whole_word_mask=True, **options)([dict(row) for row in rows])
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        masked = batch["labels"][number] != -100
        assert masked[1:length].float().mean() > 0.5
        assert not masked[0], "<bos>"
        assert not masked[length:].any()


def test_a_unigram_tokenizer_is_trained_and_its_padding_is_the_towers(tmp_path):
    lines(tmp_path / "texts.jsonl", [{"text": f"{text} {n}"} for n, text in enumerate(WORDS * 4)])
    data = {"path": str(tmp_path / "texts.jsonl"), "streaming": False}
    given = recipe(tmp_path, data, processor=None, tokenizer_vocab_size=300, tokenizer_type="unigram")
    folder = train_mlm(given)
    model, tokenizer = BifocalTextForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1
    assert len(tokenizer) <= model.config.vocab_size < len(tokenizer) + 64
    embeddings = model.get_input_embeddings()
    assert embeddings.padding_idx == 1
    assert embeddings.weight[0].abs().sum() > 0, "<s>, which comes first, learns"
    assert tokenizer.unk_token_id not in tokenizer("黒い星の絵")["input_ids"]


@pytest.mark.parametrize(
    ("kind", "lack"), [("CLIP", "has no mask token"), ("Python", "does not say where in a text its tokens are")]
)
def test_a_tokenizer_that_cannot_mask_words(tmp_path, monkeypatch, kind, lack):
    tokenizer = Characters(mask_token="<m>") if kind == "Python" else KINDS[kind]()
    monkeypatch.setattr(
        "bifocal.training.mlm.load_processor", lambda *_: BifocalProcessor(image_processor_of_size(32), tokenizer)
    )
    lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(RecipeError, match=rf"the tokenizer \({type(tokenizer).__name__}\) {lack}\. Set processor to"):
        train_mlm(recipe(tmp_path, {"path": str(tmp_path / "texts.jsonl")}))


@pytest.mark.parametrize("form", ["files", "hub"])
def test_texts_that_stream(processor, tmp_path, form):
    processor.save_pretrained(tmp_path / "processor")
    rows = [{"text": "" if n % 10 == 3 else f"{TEXTS[n % 5]} {n}"} for n in range(60)]
    if form == "files":
        lines(tmp_path / "texts.jsonl.gz", rows)
        source = {"path": str(tmp_path / "texts.jsonl.gz")}
    else:
        (tmp_path / "repo").mkdir()
        Dataset.from_list(rows).to_parquet(tmp_path / "repo" / "train.parquet")
        source = {"path": str(tmp_path / "repo"), "format": "hub"}
    folder = train_mlm(recipe(tmp_path, source))
    assert BifocalTextForMaskedLM.from_pretrained(folder).config.hidden_size == 32
    state = json.loads(next((tmp_path / "run").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["global_step"] == 3


def test_a_tokenizer_is_not_trained_on_a_stream(processor, tmp_path):
    lines(tmp_path / "texts.jsonl", [{"text": "a"}])
    with pytest.raises(RecipeError, match=r"trains a tokenizer, which a stream cannot\. Set processor"):
        train_mlm(recipe(tmp_path, {"path": str(tmp_path / "texts.jsonl")}, tokenizer_vocab_size=300))


@pytest.mark.parametrize("option", [{"ema_decay": 0.9}, {"per_device_train_batch_size": 8}, {"freeze_text_layers": 1}])
def test_arguments_without_effect_are_refused(processor, tmp_path, option):
    given = recipe(tmp_path, {"path": "x.jsonl"}, training={"max_steps": 3, **option})
    with pytest.raises(RecipeError, match=f"{next(iter(option))} has no effect on masked language modeling"):
        train_mlm(given)


def test_a_misspelt_size_of_a_text_tower_to_start_from(processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    BifocalTextForMaskedLM(small_config().text_config).save_pretrained(tmp_path / "tower")
    lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    source = {"path": str(tmp_path / "texts.jsonl")}
    for key, message in (("hidden_dropout", "has no key 'hidden_dropout'; did you mean 'hidden_dropout_prob'"),
                         ("dtype", "dtype")):  # fmt: skip
        given = recipe(tmp_path, source, start_from=str(tmp_path / "tower"), model={key: "float16"})
        with pytest.raises(RecipeError, match=f"Recipe 'words', model: .*{message}"):
            train_mlm(given)
