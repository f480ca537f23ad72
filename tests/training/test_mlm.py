"""Stage 0 on texts that stream, from files and from what datasets loads; bad rows are skipped."""

import json

import pytest
from datasets import Dataset

from bifocal.errors import RecipeError
from bifocal.modeling import BifocalTextForMaskedLM
from bifocal.training.mlm import train_mlm
from bifocal.training.recipe import Recipe
from tests.conftest import TEXTS, small_config
from tests.data.files import lines


def recipe(folder, source: dict, **changes) -> Recipe:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    values = {
        "name": "words", "output_dir": str(folder / "run"), "processor": str(folder / "processor"), "max_length": 32,
        "model": size, "mlm": {"data": {**source, "streaming": True, "max_bad_fraction": 0.2}, "batch_size": 4},
        "training": {"max_steps": 3, "disable_tqdm": True}, **changes,
    }  # fmt: skip
    return Recipe(**values)


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
