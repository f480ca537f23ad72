"""What a recipe starts from: any two towers, any dual encoder; and fine-tuning from them."""

import numpy as np
import pytest
import torch
from PIL import Image

from bifocal.errors import RecipeError
from bifocal.modeling import BifocalModel, BifocalTextModel, BifocalVisionModel
from bifocal.training.builders import add_lora, load_processor, load_start
from bifocal.training.mlm import train_mlm
from bifocal.training.recipe import Recipe, find_recipe, load_recipe
from bifocal.training.runner import prepare, run_recipe
from bifocal.training.towers import tower_of
from tests import families
from tests.conftest import small_config

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}
TASK = {"name": "pairs", "kind": "text-pair", "data": {"path": "pairs.jsonl"}, "batch_size": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints, and the images and pairs of somebody who fine-tunes."""
    root = tmp_path_factory.mktemp("start")
    for kind in ("SigLIP 2", "CLIP", "BERT", "DINOv2"):
        families.save(kind, root / kind.replace(" ", ""))
    images = root / "images"
    images.mkdir()
    lines = []
    for number, (name, color) in enumerate(list(COLORS.items()) * 4):
        Image.new("RGB", (40 + number, 36), color).save(images / f"{number}.png")
        lines.append(f'{{"file_name": "{number}.png", "caption": "a drawing on {name} ground, number {number}"}}')
    (images / "metadata.jsonl").write_text("\n".join(lines))
    pairs = [f'{{"query": "words in {name} {n}", "positive": "{n} {name} words"}}' for name in COLORS for n in range(4)]
    (root / "pairs.jsonl").write_text("\n".join(pairs))
    return root


def save(model, processor, folder) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def finetune(root, tmp_path, *overrides: str) -> Recipe:
    """The recipe that ships, made small."""
    sizes = ["images.batch_size=8", "pairs.batch_size=8", f"images.data.path={root}/images",
             f"pairs.data.path={root}/pairs.jsonl"]  # fmt: skip
    return load_recipe(
        find_recipe("finetune"),
        [f"output_dir={tmp_path}/run", "device=cpu", *(f"tasks.{size}" for size in sizes), "training.max_steps=6",
         "training.warmup_steps=0", "training.learning_rate=1e-3", "training.save_steps=3", *overrides],
    )  # fmt: skip


def test_finetune_from_siglip_2(folders, tmp_path):
    """docs/finetune-siglip.md"""
    recipe = finetune(folders, tmp_path, f"start_from={folders}/SigLIP2")
    start = BifocalModel.from_pretrained(folders / "SigLIP2")
    folder = run_recipe(recipe, save)
    model = BifocalModel.from_pretrained(folder)
    for name in ("text_config", "vision_config"):
        before, after = (getattr(it.config, name).to_dict() for it in (start, model))
        assert {key for key in before if before[key] != after[key]} <= {"dtype", "architectures"}, name
    assert (model.config.text_padding, model.config.logit_scale_max) == ("max_length", None)
    assert not torch.equal(model.logit_bias, start.logit_bias)
    texts, pixels = ["a cat", "a drawing on red ground"], Image.new("RGB", (50, 40), (255, 0, 0))
    assert not np.allclose(model.encode_text(texts), start.encode_text(texts), atol=1e-4)
    assert not np.allclose(model.encode_image(pixels), start.encode_image(pixels), atol=1e-4)
    np.testing.assert_allclose(model.encode_text(texts)[0], model.encode_text(texts[0]), atol=1e-5)
    assert type(model.processor.image_processor).__name__.startswith("Siglip")


def test_finetune_from_two_towers(folders, tmp_path):
    """docs/finetune-two-towers.md: a text model and an image model; LiT's way, the image tower stays."""
    recipe = finetune(
        folders, tmp_path, f"start_from.text={folders}/BERT", f"start_from.image={folders}/DINOv2",
        "model.vision_projection=mlp", "training.freeze_image_tower=true", "training.text_learning_rate=1e-4",
    )  # fmt: skip
    prepared = prepare(recipe.model_copy(update={"output_dir": str(tmp_path / "other")}), disable_tqdm=True)
    groups = prepared.trainer.create_optimizer().param_groups
    assert {group["lr"] for group in groups} == {1e-3, 1e-4}
    folder = run_recipe(recipe, save)
    model = BifocalModel.from_pretrained(folder)
    image = BifocalModel.from_towers(text=folders / "BERT", image=folders / "DINOv2").vision_model.state_dict()
    assert all(torch.equal(value, image[name]) for name, value in model.vision_model.state_dict().items())
    assert (model.config.projection_dim, model.config.text_projection) == (32, False)
    assert len(model.vision_projection) == 3
    assert model.encode_text("a cat").shape == model.encode_image(Image.new("RGB", (9, 9))).shape == (32,)
    kept = load_processor(recipe, [])
    assert kept.tokenizer.get_vocab() == model.processor.tokenizer.get_vocab()
    assert kept.image_processor.crop_size["height"] == families.SIDE


def recipe_from(start, **options) -> Recipe:
    values = {"name": "x", "tasks": [TASK], "training": {"max_steps": 1}, "start_from": start}
    return Recipe(**{**values, **options})


def test_settings_of_the_model_override(folders):
    towers = {"text": str(folders / "BERT"), "image": str(folders / "DINOv2")}
    model = load_start(recipe_from(towers, model={"projection_dim": 16, "prompts": {"query": "q: "}}))
    assert (model.config.projection_dim, model.config.prompts) == (16, {"query": "q: "})
    model = load_start(recipe_from(str(folders / "CLIP"), model={"prompts": {"query": "q: "}}))
    assert model.config.prompts == {"query": "q: "}
    for start, settings, message in (
        (towers, {"text_config": {"hidden_size": 8}}, "text_config is that of the tower in start_from; remove it"),
        (str(folders / "CLIP"), {"projection_dims": 8}, "projection_dims"),
        (towers, {"projection_dims": 8}, "projection_dims"),
        (str(folders / "CLIP"), {"projection_dim": 8}, "projection_dim of a CLIPModel is fixed by its weights"),
        (str(folders / "BERT"), {}, r"BERT' is not a dual encoder; name two towers, as in start_from: \{text: "),
        ({"text": str(folders / "DINOv2"), "image": str(folders / "BERT")}, {}, "which is no text encoder"),
        (str(folders / "nothing"), {}, "nothing' does not exist; check the path"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_start(recipe_from(start, model=settings))


def test_start_from_is_a_stage_or_both_towers(tmp_path):
    for towers in ("{text: a}", "{image: b}", "{stage: s, text: a}", "{}"):
        path = tmp_path / "mine.yaml"
        path.write_text(
            f"name: x\nstart_from: {towers}\nmlm: {{data: {{path: x}}, batch_size: 1}}\ntraining: {{max_steps: 1}}\n"
        )
        with pytest.raises(RecipeError, match="line 1: start_from has either stage, or both text and image"):
            load_recipe(path)


def test_own_image_tower_without_a_processor(tmp_path, processor):
    config = small_config()
    BifocalTextModel(config.text_config).save_pretrained(tmp_path / "text")
    processor.tokenizer.save_pretrained(tmp_path / "text")
    BifocalVisionModel(config.vision_config).save_pretrained(tmp_path / "image")
    model = load_start(recipe_from({"text": str(tmp_path / "text"), "image": str(tmp_path / "image")}))
    side = config.vision_config.image_size
    assert model.processor.image_processor.crop_size == {"height": side, "width": side}


def test_image_size_of_processors_that_do_not_crop(folders, tmp_path):
    recipe = recipe_from(str(folders / "SigLIP2"), image_size=16, output_dir=str(tmp_path))
    pixels = load_processor(recipe, [], load_start(recipe)).image_processor([Image.new("RGB", (40, 60))])
    assert np.asarray(pixels["pixel_values"]).shape == (1, 3, 16, 16)


def test_adapters(folders, caplog):
    towers = {"text": str(folders / "BERT"), "image": str(folders / "DINOv2")}

    def adapted(**lora):
        recipe = recipe_from(towers, lora={"r": 2, **lora})
        return add_lora(recipe, load_start(recipe))

    names = adapted().targeted_module_names
    assert {tower_of(name) for name in names} == {"text", "image"}
    assert len(names) == 2 * 6 + 2 * 6
    assert not caplog.text
    assert {tower_of(name) for name in adapted(target_modules=["intermediate.dense"]).targeted_module_names} == {"text"}
    assert "lora: target_modules names no layer of the image tower, so it is not trained." in caplog.text
    with pytest.raises(RecipeError, match=r"Recipe 'x', lora: Target modules .* Remove target_modules for all linear"):
        adapted(target_modules=["nothing_proj"])


def test_masked_language_modeling_is_for_our_text_tower(folders, tmp_path):
    mlm = {"data": {"path": str(tmp_path / "texts.jsonl")}, "batch_size": 2}
    (tmp_path / "texts.jsonl").write_text('{"text": "a cat"}\n' * 4)
    recipe = recipe_from(str(folders / "BERT"), tasks=[], mlm=mlm, output_dir=str(tmp_path / "run"), device="cpu")
    with pytest.raises(RecipeError, match="is a 'bert', but masked language modeling trains Bifocal's text tower"):
        train_mlm(recipe)
