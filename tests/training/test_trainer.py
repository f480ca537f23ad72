"""MultiTaskTrainer: the joint loss, what a step does, and going on after a stop."""

import copy
import json

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, TrainingArguments

from bifocal.errors import TrainingError
from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.callbacks.stopwatch import Stopwatch, training_seconds
from bifocal.training.checkpoints import last_complete_checkpoint
from bifocal.training.losses import info_nce, info_nce_plus
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo

SMALL = dict(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def image_task(**options) -> Task:
    data = Dataset.from_dict(
        {"image": [photo(32 + n, 32) for n in range(5)], "caption": TEXTS},
        features=Features({"image": Image(), "caption": Value("string")}),
    )
    return Task("images", "image-text", data, 4, **options)


def texts(kind: str = "text-triplet", **options) -> Task:
    data = Dataset.from_dict(
        {"query": TEXTS, "positive": [text.upper() + " again" for text in TEXTS], "negatives": [["star", "box"]] * 5}
    )
    name, temperature = ("triplets", 0.1) if kind == "text-triplet" else ("pairs", None)
    return Task(name, kind, data, 3, temperature=temperature, **options)


def trainer(
    tmp_path, processor, steps: int = 6, tasks=None, model=None, eval_tasks=None, **options
) -> MultiTaskTrainer:
    torch.manual_seed(0)
    settings = dict(
        output_dir=str(tmp_path), max_steps=steps, learning_rate=1e-3, logging_steps=2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return MultiTaskTrainer(
        model=model or BifocalModel(small_config(vision_config={"patch_dropout": 0.2})),
        args=BifocalTrainingArguments(**{**settings, **options}),
        tasks=tasks or [image_task(), texts()],
        processor=processor,
        max_length=32,
        eval_tasks=eval_tasks,
        callbacks=[Stopwatch()],
    )


def test_the_loss_is_the_weighted_sum(tmp_path, processor):
    parts = [image_task(loss_weight=0.5), texts()]
    it = trainer(tmp_path, processor, tasks=parts)
    model = it.model.eval()
    batch = next(iter(it.get_train_dataloader()))
    loss, outputs = it.compute_loss(model, batch, return_outputs=True)

    rows = {name: columns.rows for name, columns in batch["tasks"].items()}

    def text(task: Task, column: str):
        values = [task.dataset[row][column] for row in rows[task.name]]
        flat = [text for value in values for text in (value if isinstance(value, list) else [value])]
        return torch.from_numpy(model.encode_text(flat, max_length=32))

    model.processor = processor
    images = torch.from_numpy(model.encode_image([parts[0].dataset[row]["image"]["bytes"] for row in rows["images"]]))
    torch.testing.assert_close(outputs["images"], images, atol=1e-5, rtol=0)
    expected = 0.5 * info_nce(text(parts[0], "caption"), images, 0.07)
    expected = expected + info_nce_plus(
        text(parts[1], "query"), text(parts[1], "positive"), text(parts[1], "negatives").view(3, 2, -1), 0.1,
        negative_ids=torch.zeros(3, 2),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_training_learns_and_logs(tmp_path, processor):
    it = trainer(tmp_path, processor, steps=30, logging_steps=5)
    it.train()
    logs = [entry for entry in it.state.log_history if "loss" in entry]
    assert len(logs) == 6
    for name in ("images", "triplets"):
        assert logs[-1][f"loss/{name}"] < logs[0][f"loss/{name}"]
        assert 0 <= logs[0][f"accuracy/{name}"] <= 1
    assert logs[-1]["accuracy/triplets"] > logs[0]["accuracy/triplets"]
    assert logs[-1]["loss"] == pytest.approx(logs[-1]["loss/images"] + logs[-1]["loss/triplets"], rel=1e-5)
    assert 0.01 <= logs[-1]["temperature"] <= 0.1
    whole = (logs[0]["grad_norm/text"] ** 2 + logs[0]["grad_norm/image"] ** 2) ** 0.5
    assert whole == pytest.approx(logs[0]["grad_norm"], rel=0.02), "all but the temperature's"
    assert logs[0]["samples_per_second"] > 0
    assert logs[0]["tokens_per_second"] > 0
    assert 0 <= logs[0]["padding"] < 0.5
    assert 0 <= logs[0]["data_wait"] <= 1


def test_a_stopped_run_resumes_exactly(tmp_path, processor):
    whole = trainer(tmp_path / "whole", processor, steps=8)
    whole.train()
    options = dict(save_strategy="steps", save_steps=3, restore_callback_states_from_checkpoint=True)
    first = trainer(tmp_path / "cut", processor, steps=8, **options)
    first.train()
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    second = trainer(tmp_path / "cut", processor, steps=8, **options)
    second.train(resume_from_checkpoint=str(checkpoint))
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    losses = [[entry["loss"] for entry in it.state.log_history if "loss" in entry] for it in (whole, second)]
    assert losses[0] == losses[1], "also of the steps before the checkpoint that were not logged yet"
    stored = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["Stopwatch"]
    assert training_seconds(second) > stored["args"]["seconds"] > 0, "of both runs"


def test_checkpoints_load_as_models(tmp_path, processor):
    processor = copy.deepcopy(processor)  # with tokens that the Trainer writes into the config
    processor.tokenizer.bos_token, processor.tokenizer.eos_token = "[CLS]", "[SEP]"
    it = trainer(tmp_path, processor, steps=2, save_strategy="steps", save_steps=2)
    it.train()
    model = BifocalModel.from_pretrained(tmp_path / "checkpoint-2")
    assert model.encode_text("black star").shape == (40,)
    assert model.config.text_config.eos_token_id == processor.tokenizer.sep_token_id
    again = BifocalModel.from_pretrained(export_model(model, tmp_path / "model"))
    assert again.config.text_config.eos_token_id == processor.tokenizer.sep_token_id


def test_a_temperature_beyond_its_bound_learns_again(tmp_path, processor):
    it = trainer(tmp_path, processor, steps=3, learning_rate=1e-2)
    with torch.no_grad():
        it.model.logit_scale.fill_(7.0)
    it.train()
    assert 4.5 < it.model.logit_scale.item() < 4.605, "from the bound on, and down"


def test_a_loss_that_is_not_finite_stops_with_its_task(tmp_path, processor):
    it = trainer(tmp_path, processor, steps=2)
    with torch.no_grad():
        it.model.vision_projection.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss of task 'images' is nan at step 1 .rows \d, \d, \d, \d.. Look"):
        it.train()


def test_wrong_set_ups(tmp_path, processor):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    model = BifocalModel(small_config())
    stream = Task("stream", "image-text", image_task().dataset.to_iterable_dataset(), 4)
    with pytest.raises(
        ValueError, match="no length, since task 'stream' streams; set max_steps, or num_rows of the task"
    ):
        MultiTaskTrainer(model, arguments, [stream], processor, 32)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    pairs = texts("text-pair")
    clip = CLIPModel(CLIPConfig(text_config=SMALL, vision_config={**SMALL, "image_size": 32, "patch_size": 8}))
    for wrong, given, message in (
        ({"tasks": []}, model, "at least one task"),
        ({"tasks": [pairs, pairs]}, model, "a name of its own, but they are pairs, pairs"),
        ({"tasks": pairs.dataset}, model, "tasks must be Tasks, but there is a Dataset; wrap data like"),
        ({"tasks": [pairs], "eval_tasks": {"v": pairs.dataset}}, model, "eval_tasks must be Tasks, .* a Dataset"),
        ({"tasks": [pairs]}, BertModel(BertConfig(**SMALL)), "A BertModel has no get_text_features; MultiTaskTrainer"),
        ({"tasks": [pairs], "processor": None}, clip, "comes without a processor; pass processor="),
        ({"tasks": [pairs], "processor": processor.tokenizer}, clip, "has no tokenizer; pass processor="),
    ):
        with pytest.raises(TrainingError, match=message):
            MultiTaskTrainer(given, arguments, **{"processor": processor, **wrong})


def test_the_last_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step, state in ((50, '{"global_step": 50}'), (100, '{"global_step": 100}'), (150, '{"glob'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-notes").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "checkpoint-100", "checkpoint-50", "checkpoint-notes", "incomplete-checkpoint-150", "incomplete-checkpoint-200",
    ], "cut ones are out of the way, and still there: somebody may have removed that file on purpose"  # fmt: skip
    (tmp_path / "checkpoint-200").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert (tmp_path / "incomplete-checkpoint-200" / "model.safetensors").exists()
    assert (tmp_path / "incomplete-checkpoint-200-2").is_dir()
