"""Training towers of other families: which parameters learn and how fast, gradient cache, checkpointing, averages."""

import copy
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from torch import nn
from transformers import AlbertConfig, AlbertModel, ResNetConfig, ResNetModel

from bifocal.errors import TrainingError
from bifocal.evaluation.encoders import encoder_of
from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.modeling.towers_bifocal import layers_of
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.engine.chunk_size import kept_per_row
from bifocal.training.engine.gradient_cache import cached_step, into_chunks
from bifocal.training.engine.joint_forward import clamp_logit_scale, embed
from bifocal.training.losses import sigmoid_loss
from bifocal.training.param_groups import freeze, parameter_groups, without_gradient
from bifocal.training.tasks import Task
from bifocal.training.towers import linear_layers, tower_of
from bifocal.training.trainer import MultiTaskTrainer
from tests import families
from tests.modeling.test_images import photo

TOWERS = {
    "BERT and DINOv2": ("BERT", "DINOv2"),
    "MPNet and ViT": ("MPNet", "ViT"),
    "XLM-R and DINOv3": ("XLM-R", "DINOv3"),
}
DUAL = ("CLIP", "SigLIP", "AltCLIP")
PLAIN = ("plain CLIP", "plain SigLIP")
KINDS = (*DUAL, *TOWERS, *PLAIN)
CAPTIONS = [f"{color} {thing}" for color in ("red", "blue") for thing in ("cat", "fox", "dog", "rain over the clouds")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for kind in (*DUAL, *{name for pair in TOWERS.values() for name in pair}):
        families.save(kind, root / kind)
    return root


@pytest.fixture
def build(folders):
    """A function from a kind to a model and its processor."""

    def model_of(kind: str, **settings: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        if kind in PLAIN:
            model, processor = families.DUAL_ENCODERS[kind.removeprefix("plain ")]()
            return model, BifocalProcessor(processor.image_processor, processor.tokenizer)
        if kind in TOWERS:
            text, image = TOWERS[kind]
            model = BifocalModel.from_towers(text=folders / text, image=folders / image, **settings)
        else:
            model = BifocalModel.from_pretrained(folders / kind, **settings)
        return model, model.processor

    return model_of


def tasks(**options: Any) -> list[Task]:
    images = Dataset.from_dict(
        {"image": [photo(32 + n, 40 - n) for n in range(8)], "caption": CAPTIONS},
        features=Features({"image": Image(), "caption": Value("string")}),
    )
    pairs = Dataset.from_dict({"query": CAPTIONS, "positive": [f"a drawing of a {text}" for text in CAPTIONS]})
    return [Task("images", "image-text", images, 8, **options), Task("pairs", "text-pair", pairs, 4)]


def trainer_of(model: Any, processor: Any, folder: Path, steps: int = 2, own: Any = None, **options: Any) -> Any:
    settings = dict(
        output_dir=str(folder), max_steps=steps, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", weight_decay=0.1, lr_scheduler_type="constant", logging_steps=1,
    )  # fmt: skip
    return MultiTaskTrainer(model, BifocalTrainingArguments(**{**settings, **options}), own or tasks(), processor)


def batch_of(trainer: Any) -> Any:
    return next(iter(trainer.get_train_dataloader()))


def rates(model: Any, folder: Path, **options: Any) -> dict[str, tuple[float, float]]:
    args = BifocalTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", learning_rate=1e-3, weight_decay=0.1, **options
    )
    groups = parameter_groups(model, args)
    listed = [name for group in groups for name in group["names"]]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters()), "each parameter once"
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_decay_and_nothing_else(build, kind, tmp_path):
    model, _ = build(kind)
    for name, (_, decay) in rates(model, tmp_path).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        matrix = isinstance(owner, nn.Linear | nn.Conv2d | nn.MultiheadAttention) and "bias" not in name
        assert decay == (0.1 if matrix else 0.0), name


@pytest.mark.parametrize("kind", KINDS)
def test_rates_fall_from_layer_to_layer(build, kind, tmp_path):
    model, _ = build(kind)
    found = rates(model, tmp_path, layer_lr_decay=0.5, image_learning_rate=1e-4)
    by_parameter = {id(parameter): found[name][0] for name, parameter in model.named_parameters()}
    for tower, top in ((model.text_model, 1e-3), (model.vision_model, 1e-4)):
        layers = layers_of(tower)
        assert len(layers) == 2
        for level, layer in ((1, layers[1]), (2, layers[0])):
            for parameter in layer.parameters():
                assert by_parameter[id(parameter)] == pytest.approx(top * 0.5**level)
        tables = [p for m in tower.modules() if isinstance(m, nn.Embedding | nn.Conv2d) for p in m.parameters()]
        assert tables
        assert [by_parameter[id(p)] for p in tables] == pytest.approx([top * 0.5**3] * len(tables))
    expected = {  # norms before the layers, norms and heads after them
        "pre_layrnorm": 1e-4 * 0.5**3, "post_layernorm": 1e-4, "final_layer_norm": 1e-3, "vision_projection": 1e-4,
        "probe": 1e-4, "vision_model.layernorm": 1e-4, "mask_token": 1e-4 * 0.5**3, "transformation": 1e-3,
        "relative_attention_bias": 1e-3 * 0.5**3,
    }  # fmt: skip
    for part, rate in expected.items():
        assert all(r == pytest.approx(rate) for name, (r, _) in found.items() if f"{part}." in f"{name}."), part


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_stays_and_all_else_moves(build, kind, tmp_path):
    model, processor = build(kind)
    trainer = trainer_of(model, processor, tmp_path, freeze_text_layers=1, freeze_image_tower=True, weight_decay=0.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    idle = set(trainer.without_gradient())
    trainer.train()
    frozen = {id(p) for p in model.vision_model.parameters()} | {
        id(p) for p in layers_of(model.text_model)[0].parameters()
    }
    frozen |= {id(p) for m in model.text_model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        stays = id(parameter) in frozen or name in idle
        below = tower_of(name) == "text" and "embeddings." in name
        assert torch.equal(parameter, before[name]) == (stays or below), name


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_a_gradient_are_known(build, kind, tmp_path):
    """What is left has a gradient after every step, as DDP demands."""
    model, processor = build(kind)
    trainer = trainer_of(model, processor, tmp_path)
    trainer.compute_loss(model, batch_of(trainer)).backward()
    missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert set(trainer.without_gradient()) == missing
    pairs = trainer_of(model, processor, tmp_path, own=tasks()[1:])
    images = {name for name, _ in model.named_parameters() if tower_of(name) == "image"}
    assert images | {"logit_scale"} <= set(pairs.without_gradient())
    assert not [name for name in pairs.without_gradient() if ".encoder.layer" in name and tower_of(name) == "text"]


def test_a_head_that_another_pooling_bypasses_is_not_trained(build, tmp_path):
    model, processor = build("SigLIP", vision_pooling="mean")
    idle = trainer_of(model, processor, tmp_path).without_gradient()
    assert {name for name in idle if "vision_model.head" in name}
    assert all("vision_model.head" in name for name in idle)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_gradients_are_those_of_a_direct_step(build, kind, checkpointing, tmp_path):
    """The direct step embeds the same chunks, since a draw of dropout depends on the shape it is drawn for."""
    direct, processor = build(kind)
    trainer = trainer_of(direct, processor, tmp_path)
    batch = batch_of(trainer)
    objective = trainer.joint_loss(trainer.tasks, trainer.world)
    chunks = into_chunks(batch["texts"], batch["images"], 3, 2)
    assert len(chunks) >= 10
    cached = copy.deepcopy(direct).train()
    if checkpointing:
        cached.activation_checkpointing_enable()
        used = {tower_of(name) for name, m in cached.named_modules() if getattr(m, "gradient_checkpointing", False)}
        assert used >= ({"image"} if kind == "MPNet and ViT" else {"text", "image"})
    direct.train()
    torch.manual_seed(7)
    parts = [embed(direct, *chunk) for chunk in chunks]
    joined = {name: torch.cat([part[name] for part in parts if name in part]) for name in ("texts", "images")}
    loss, _ = objective({**parts[0], **joined}, batch)
    loss.backward()
    torch.manual_seed(7)
    total = cached_step(
        chunks,
        lambda texts, images: embed(cached, texts, images),
        lambda embedded: objective(embedded, batch)[0],
        lambda scalar: scalar.backward(),
        nullcontext,
    )
    torch.testing.assert_close(total, loss.detach(), atol=1e-5, rtol=1e-5)
    for (name, left), right in zip(direct.named_parameters(), cached.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        if left.grad is not None:
            torch.testing.assert_close(right.grad, left.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["SigLIP", "BERT and DINOv2", "plain CLIP"])
def test_averages_checkpointing_and_found_chunk_sizes(build, kind, tmp_path):
    model, processor = build(kind)
    trainer = trainer_of(
        model, processor, tmp_path, steps=3, ema_decay=0.5, activation_checkpointing=True, auto_find_chunk_size=True
    )
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert (trainer.args.text_chunk_size, trainer.args.image_chunk_size) == (8, 8)
    moved = {tower_of(name) for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"text", "image"} <= moved
    trainer.save_model(str(tmp_path / "saved"))
    again = type(model).from_pretrained(tmp_path / "saved")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


def test_chunk_sizes_count_the_padding_that_is_computed(build, tmp_path):
    """SigLIP attends to all positions, so a short longest text saves nothing."""
    args = BifocalTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    model, processor = build("SigLIP")
    assert kept_per_row(model, 4, processor, args) == kept_per_row(model, families.LENGTH, processor, args)
    model, processor = build("BERT and DINOv2")
    assert kept_per_row(model, 4, processor, args)[0] < 0.5 * kept_per_row(model, families.LENGTH, processor, args)[0]


def test_towers_in_16_bits_are_trained_in_float32(folders, tmp_path):
    for kind in ("BERT", "DINOv2"):
        tower, processor = {**families.TEXT_TOWERS, **families.IMAGE_TOWERS}[kind]()
        tower.to(torch.bfloat16).save_pretrained(tmp_path / kind)
        processor.save_pretrained(tmp_path / kind)
    model = BifocalModel.from_towers(text=tmp_path / "BERT", image=tmp_path / "DINOv2")
    assert model.dtype == torch.bfloat16
    trainer = trainer_of(model, model.processor, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = BifocalModel.from_pretrained(tmp_path / "saved")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_sigmoid_loss_has_the_models_scale_and_bias(build, tmp_path):
    for kind in ("SigLIP", "plain SigLIP"):
        model, processor = build(kind)
        with torch.no_grad():
            model.logit_scale.fill_(5.0)  # above CLIP's limit, ln 100
        trainer = trainer_of(model, processor, tmp_path / kind)
        assert (trainer.tasks["images"].loss, trainer.tasks["pairs"].loss) == ("sigmoid", "info_nce")
        batch = batch_of(trainer)
        model.eval()
        with torch.no_grad():
            embedded = embed(model, batch["texts"], batch["images"])
        result = trainer.joint_loss(trainer.tasks, trainer.world)(embedded, batch)[1]["images"]
        first, last = batch["tasks"]["images"].spans["caption"]
        captions = embedded["texts"][batch["order"]][first:last]
        expected = sigmoid_loss(captions, embedded["images"], 1 / torch.tensor(5.0).exp(), bias=model.logit_bias)
        torch.testing.assert_close(result.loss, expected)
        clamp_logit_scale(model)
        assert model.logit_scale.item() == 5.0


@pytest.mark.parametrize("kind", ["SigLIP", "plain SigLIP"])
def test_siglip_scores_in_use_what_it_scores_in_training(build, kind, tmp_path):
    """Texts of several lengths are padded in training as in use."""
    model, processor = build(kind)
    with torch.no_grad():  # for weights that are new
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-3.0)
    drawn = [PIL.Image.new("RGB", (40, 36), color) for color in itertools.product((0, 255), repeat=3)]
    captions = [f"{text} {'and a small cat ' * (number % 4)}" for number, text in enumerate(CAPTIONS)]
    data = Dataset.from_dict(
        {"image": drawn, "caption": captions}, features=Features({"image": Image(), "caption": Value("string")})
    )
    task = Task("colors", "image-text", data, 8)
    trainer = trainer_of(model, processor, tmp_path, 60, [task], learning_rate=1e-3, logging_steps=100)
    trainer.train()
    assert trainer.evaluate(task)["eval_colors_accuracy"] == pytest.approx(1.0)
    for texts, images in ((captions, drawn), (captions[3:4], drawn)):  # in a batch, and alone
        if kind == "SigLIP":
            scores = model.encode_text(texts) @ model.encode_image(images).T
        else:
            encoder = encoder_of(model.eval(), processor, "it")
            scores = encoder.texts(texts) @ encoder.images(images).T
        assert scores.argmax(1).tolist() == [captions.index(text) for text in texts]


def test_training_leaves_the_tokens_in_the_configuration(tmp_path):
    """transformers' Trainer writes the tokenizer's into the text tower's, whose positions may depend on them."""
    model, processor = families.DUAL_ENCODERS["SigLIP 2"]()
    before = model.config.text_config.to_dict()
    assert before["pad_token_id"] != processor.tokenizer.pad_token_id
    trainer_of(model, processor, tmp_path, steps=1).train()
    assert model.config.text_config.to_dict() == before


def test_towers_without_checkpointing_are_named(build, tmp_path, caplog):
    model, processor = build("MPNet and ViT")
    trainer_of(model, processor, tmp_path, activation_checkpointing=True)
    assert "activation_checkpointing has no effect on the text tower: a MPNetModel does not support it." in caplog.text
    assert "on the image tower" not in caplog.text


def test_losses_follow_the_model_unless_a_task_says_otherwise(build, tmp_path):
    model, processor = build("SigLIP")
    trainer = trainer_of(model, processor, tmp_path, own=tasks(loss="info_nce", label_smoothing=0.1))
    assert trainer.tasks["images"].loss == "info_nce"
    assert "logit_bias" in trainer.without_gradient()
    with pytest.raises(TrainingError, match="Task 'images' has label_smoothing, which the sigmoid loss does not"):
        trainer_of(model, processor, tmp_path, own=tasks(label_smoothing=0.1))
    model, processor = build("CLIP")
    assert trainer_of(model, processor, tmp_path).tasks["images"].loss == "info_nce"


def test_prompts_of_queries_and_documents(build, tmp_path):
    model, processor = build("BERT and DINOv2", prompts={"query": "the quick ", "document": "one two "})
    own = [*tasks(), Task("same", "text-pair", tasks()[1].dataset, 4, prompts={"query": "fox ", "positive": "fox "})]
    own.append(Task("none", "text-pair", tasks()[1].dataset, 4, prompts={}))
    trainer = trainer_of(model, processor, tmp_path, own=own)
    collate = trainer.data_collator
    seen = {}
    for task in own:
        columns = {name: task.dataset[:2][name] for name in task.dataset.column_names}
        batch = collate([{"step": 0, "tasks": [(task, [0, 1], columns)]}])
        rows = [row[row != processor.tokenizer.pad_token_id] for part in batch["texts"] for row in part["input_ids"]]
        seen[task.name] = [processor.tokenizer.decode(rows[i], skip_special_tokens=True) for i in batch["order"]]
    assert seen["images"] == ["the quick red cat", "the quick red fox"], "captions search images, as queries do"
    assert seen["pairs"] == [
        "the quick red cat", "the quick red fox", "one two a drawing of a red cat", "one two a drawing of a red fox",
    ]  # fmt: skip
    assert seen["same"][0] == "fox red cat"
    assert seen["same"][2] == "fox a drawing of a red cat"
    assert seen["none"][0] == "red cat"
    with pytest.raises(
        TrainingError, match="prompts has the key 'document', which is no column of texts; use query, po"
    ):
        Task("pairs", "text-pair", tasks()[1].dataset, 4, prompts={"document": "x"})


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_go_to_the_linear_layers_of_both_towers(build, kind):
    from peft import LoraConfig, get_peft_model

    model, _ = build(kind)
    names = linear_layers(model)
    inside = {id(m) for t in (model.text_model, model.vision_model) for layer in layers_of(t) for m in layer.modules()}
    wanted = [name for name, m in model.named_modules() if id(m) in inside and isinstance(m, nn.Linear)]
    assert names == wanted
    assert {tower_of(name) for name in names} == {"text", "image"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    assert sorted(adapted.targeted_module_names) == sorted(names)


class Pair(nn.Module):
    """A dual encoder of any two towers, as somebody may write it."""

    def __init__(self, text: nn.Module, vision: nn.Module) -> None:
        super().__init__()
        self.text_model, self.vision_model = text, vision


def test_towers_without_layers_or_that_share_them(tmp_path):
    small = dict(hidden_size=16, embedding_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=20)
    text = AlbertModel(AlbertConfig(**small))
    convolutions = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", hidden_act="relu")
    )
    # What ResNet holds in nn.Sequential is no list of layers.
    convolutions.encoder = nn.Sequential(nn.Conv2d(3, 3, 1))
    model = Pair(text, convolutions)
    assert rates(model, tmp_path, image_learning_rate=1e-4)
    with pytest.raises(TrainingError, match=r"layer_lr_decay needs the layers of the image tower, but a ResNetModel"):
        rates(model, tmp_path, layer_lr_decay=0.5)
    with pytest.raises(TrainingError, match=r"freeze_image_layers needs the layers of the image tower"):
        freeze(model, image_layers=1)
    with pytest.raises(
        TrainingError, match=r"freeze_text_layers is 3, but the text tower has 1 layers; see also freeze"
    ):
        freeze(model, text_layers=3)
    assert freeze(model, image_tower=True)

    shared = Pair(text, nn.ModuleDict({"inner": text}))
    with pytest.raises(TrainingError, match=r"Both towers share '.*', so freeze_image_tower would change both"):
        freeze(shared, image_tower=True)
    with pytest.raises(TrainingError, match=r"so text_learning_rate would change both; remove text_learning_rate"):
        rates(shared, tmp_path, text_learning_rate=1e-4)
    assert rates(shared, tmp_path)


def test_without_examples_a_tower_is_taken_to_be_used(build):
    model, _ = build("BERT and DINOv2")
    assert without_gradient(model, tasks()) == []
    idle = without_gradient(model, tasks()[1:])
    assert set(idle) == {name for name, _ in model.named_parameters() if tower_of(name) == "image"} | {"logit_scale"}
