"""Images with names in one language and text pairs between languages: all languages find the images."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bifocal.errors import RecipeError
from bifocal.modeling import BifocalModel
from bifocal.training.recipe import Recipe, load_recipe
from bifocal.training.runner import run_recipe
from tests.conftest import SHARED
from tests.data.files import good, image_bytes, row_errors, stream

EMOJI = SHARED / "emoji" / "train.parquet"
ROWS = 120


def table(path, names: list[dict[str, str | None]]) -> str:
    images = [{"bytes": image_bytes(seed=number), "path": None} for number in range(len(names))]
    pq.write_table(pa.table({"image": images, "names": names}), path)
    return str(path)


def test_names_by_language(tmp_path):
    names = [{"en": "star", "de": "Stern", "ja": None}, {"en": "rain", "de": "Regen", "ja": "雨"}]
    path = table(tmp_path / "a.parquet", names)
    for mapping in ({"names": {"en": "query", "de": "positive"}}, {"names.en": "query", "names.de": "positive"}):
        rows = good(stream(path, "text-pair", column_mapping=mapping))
        assert [(row["query"], row["positive"]) for row in rows] == [("star", "Stern"), ("rain", "Regen")]
    rows = good(stream(path, "image-text", column_mapping={"names": "caption"}))
    assert [row["caption"] for row in rows] == [["star", "Stern"], ["rain", "Regen", "雨"]]


def test_a_struct_that_is_not_mapped_is_no_text(tmp_path):
    """It may hold anything, such as a text and its source."""
    rows = [{"query": "a", "positive": {"text": "b", "source": "c"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert set(row_errors(stream(tmp_path / "a.parquet", "text-pair")).values()) == {"no positive"}


def test_a_type_of_tokenizer_needs_a_size(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: a\ntokenizer_type: unigram\ntasks: []\nmlm: {data: {path: a.jsonl}, batch_size: 1}\n"
                    "training: {max_steps: 1}\n")  # fmt: skip
    with pytest.raises(RecipeError, match="tokenizer_type needs tokenizer_vocab_size, the number of tokens"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"'tokenizer_type=bpe': .*'wordpiece' or 'unigram'"):
        load_recipe(path, ["tokenizer_type=bpe", "tokenizer_vocab_size=200"])


@pytest.mark.skipif(not EMOJI.exists(), reason=f"needs the emoji of {EMOJI.parent}")
def test_text_pairs_join_languages_without_a_caption(tmp_path):
    """Emoji with English names, and pairs of an English name and the German, Chinese or Thai one."""
    source = {"path": str(EMOJI), "limit": ROWS}
    tower = {"hidden_size": 64, "num_attention_heads": 2, "initializer_range": 0.05, "num_hidden_layers": 1}
    vision = {"intermediate_size": 170, "image_size": 32, "patch_size": 8, "patch_dropout": 0.0}
    tasks = [{"name": "images", "kind": "image-text", "data": {**source, "column_mapping": {"names.en": "caption"}}}]
    for language in ("de", "zh", "th"):
        mapping = {"names": {"en": "query", language: "positive"}}
        tasks.append({"name": language, "kind": "text-pair", "data": {**source, "column_mapping": mapping}})
    recipe = Recipe(
        name="languages", output_dir=str(tmp_path / "run"), device="cpu", image_size=32, max_length=24,
        tokenizer_vocab_size=1500, tokenizer_type="unigram", tasks=[task | {"batch_size": 60} for task in tasks],
        model={
            "projection_dim": 64, "vision_config": tower | vision | {"rope_reference_grid": 4},
            "text_config": tower | {"intermediate_size": 128, "hidden_dropout_prob": 0.0},
        },
        training={
            "max_steps": 80, "learning_rate": 2e-3, "warmup_steps": 8, "lr_scheduler_type": "cosine",
            "max_grad_norm": 1.0, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
        },
    )  # fmt: skip
    run_recipe(recipe, lambda model, processor, folder: [part.save_pretrained(folder) for part in (model, processor)])
    model = BifocalModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config.text_config.pad_token_id == model.processor.tokenizer.pad_token_id == 1
    rows = pq.read_table(EMOJI).slice(0, ROWS).to_pylist()
    images = model.encode_image([row["image"]["bytes"] for row in rows])

    def recall(language: str) -> float:
        scores = model.encode_text([row["names"][language] for row in rows]) @ images.T
        return float(((scores >= np.diag(scores)[:, None]).sum(axis=1) <= 5).mean())

    found = {language: recall(language) for language in ("en", "de", "zh", "th", "ko")}
    assert found["en"] > 0.9
    assert min(found[language] for language in ("de", "zh", "th")) > 0.5
    assert found["ko"] < 0.25, "which it has never seen; chance is 0.04"
