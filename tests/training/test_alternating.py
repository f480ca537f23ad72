"""`alternate_modalities`: the batches of the joint run, one modality at a time, and steps that move nothing else."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback
from typer.testing import CliRunner

from bifocal.cli import app
from bifocal.errors import TrainingError
from bifocal.modeling import BifocalModel, load_image
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.callbacks.epochs import steps_per_epoch
from bifocal.training.engine.distributed import require_partial_gradients
from bifocal.training.joint_batches import JointBatchDataset, JointBatchStream
from bifocal.training.param_groups import parameter_groups
from bifocal.training.tasks import Task
from bifocal.training.towers import tower_of
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo, png
from tests.training.test_signature import pairs
from tests.training.test_trainer import trainer


def captioned(rows: int = 12, stream: bool = False) -> Task:
    images = [png(photo(32 + n, 32)) for n in range(rows)]
    data = Dataset.from_dict({"image": images, "caption": [f"{TEXTS[n % 5]} {n}" for n in range(rows)]})
    return Task("images", "image-text", data.to_iterable_dataset(num_shards=12) if stream else data, 4)


def model() -> BifocalModel:
    torch.manual_seed(0)
    return BifocalModel(small_config())


def alternating(folder, processor, steps: int = 6, **options):
    tasks = options.pop("tasks", None) or [captioned(), pairs()]
    options = {"alternate_modalities": True, "logging_steps": 1, "lr_scheduler_type": "constant", **options}
    return trainer(folder, processor, steps=steps, tasks=tasks, model=options.pop("model", None) or model(), **options)


def seen(batches) -> list[list[tuple[str, list]]]:
    return [[(task.name, rows) for task, rows, _ in item["tasks"]] for item in batches]


# Batches


@pytest.mark.parametrize("stream", [False, True])
def test_batches_are_those_of_the_joint_run(stream):
    tasks = [pairs(), captioned(stream=stream), pairs("b", sampling_weight=2.0)]
    kind = JointBatchStream if stream else JointBatchDataset
    joint, split = (kind(tasks, steps, seed=3, alternate=steps == 13) for steps in (7, 13))
    if not stream:
        joint, split = ([batches[step] for step in range(len(batches))] for batches in (joint, split))
    together, apart = seen(joint), seen(split)
    assert [len(parts) for parts in apart] == [1] * 13
    assert [parts[0][0] == "images" for parts in apart] == [True, False] * 6 + [True]
    joined = [sorted(apart[step] + apart[step + 1]) for step in range(0, 12, 2)]
    assert joined == [sorted(parts) for parts in together[:6]]
    assert {parts[0][0] for parts in apart} == {"images", "a", "b"}


def test_tasks_of_one_modality_are_not_affected():
    tasks = [pairs(), pairs("b")]
    joint, split = (JointBatchDataset(tasks, 8, 0, alternate=alternate) for alternate in (False, True))
    assert seen(joint[step] for step in range(8)) == seen(split[step] for step in range(8))
    assert not split.schedule.alternates
    assert split.schedule.num_batches("text") == 8


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_workers_see_every_row_of_a_stream_once(workers, monkeypatch):
    """With an even number of workers, each makes batches of one modality only."""
    texts = Dataset.from_dict({"query": [f"q{n}" for n in range(48)], "positive": [f"p{n}" for n in range(48)]})
    texts = Task("texts", "text-pair", texts.to_iterable_dataset(num_shards=12), 4)
    batches = JointBatchStream([captioned(48, stream=True), texts], 24, seed=0, alternate=True)
    batches.decode = lambda image: image
    parts = []
    for number in range(workers):
        monkeypatch.setattr(
            "torch.utils.data.get_worker_info", lambda n=number: SimpleNamespace(id=n, num_workers=workers)
        )
        parts.append(list(batches))
    items = sorted((item for part in parts for item in part), key=lambda item: item["step"])
    assert [item["tasks"][0][0].name for item in items] == ["images", "texts"] * 12
    for task, column, expected in (
        ("images", "caption", [f"{TEXTS[n % 5]} {n}" for n in range(48)]),
        ("texts", "query", [f"q{n}" for n in range(48)]),
    ):
        rows = [row for item in items for t, _, columns in item["tasks"] if t.name == task for row in columns[column]]
        assert Counter(rows) == Counter(expected)


def test_an_epoch_passes_through_both(tmp_path, processor):
    one, two = pairs(batch_size=5), captioned()  # 20 rows and 12: 4 batches and 3
    assert steps_per_epoch([one, two], 1, 1) == 4
    assert steps_per_epoch([one, two], 1, 1, alternate=True) == 8
    assert steps_per_epoch([one, two], 1, 3, alternate=True) == 3
    assert steps_per_epoch([one], 1, 1, alternate=True) == 4, "nothing alternates"
    it = alternating(tmp_path, processor, steps=-1, num_train_epochs=1, tasks=[one, two])
    it.train()
    assert it.state.global_step == 8
    assert it.state.epoch == 1.0
    rows = [
        row
        for step in range(8)
        for task, rows, _ in it.joint_batches[step]["tasks"]
        if task.name == "a"
        for row in rows
    ]
    assert sorted(rows) == list(range(20))


# Steps


def test_it_equals_a_plain_loop(tmp_path, processor):
    """AdamW with decay, clipping aside, on the batches of the joint run, one part after the other."""
    settings = dict(weight_decay=0.1, max_grad_norm=1e9)
    it = alternating(tmp_path, processor, **settings)
    it.train()

    plain, tasks = model().train(), [captioned(), pairs()]
    args = BifocalTrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-3, use_cpu=True, report_to="none", **settings
    )
    optimizer = torch.optim.AdamW(parameter_groups(plain, args))
    joint, losses = JointBatchDataset(tasks, 3, args.seed), []
    for step in range(6):
        _, _, columns = joint[step // 2]["tasks"][step % 2]
        first = columns["caption" if step % 2 == 0 else "query"]
        a = plain.get_text_features(**tokens(processor, first)).pooler_output
        if step % 2 == 0:
            pixels = processor(images=[load_image(value) for value in columns["image"]], return_tensors="pt")
            b, temperature = plain.get_image_features(**pixels).pooler_output, 1 / plain.logit_scale.exp()
        else:
            b, temperature = plain.get_text_features(**tokens(processor, columns["positive"])).pooler_output, 0.05
        logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).t() / temperature
        targets = torch.arange(len(logits))
        loss = F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    logged = [entry["loss"] for entry in it.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    for (name, ours), theirs in zip(it.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def tokens(processor, texts) -> dict[str, torch.Tensor]:
    return dict(processor.tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt"))


class Moves(TrainerCallback):
    """Records what has a gradient in each step, and what moves."""

    def __init__(self):
        self.gradients, self.moved = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name for name, p in model.named_parameters() if p.grad is not None})
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.moved.append({name for name, p in model.named_parameters() if not torch.equal(p, self.before[name])})


@pytest.mark.parametrize("options", [{}, {"text_chunk_size": 3, "image_chunk_size": 2, "ema_decay": 0.5}])
def test_texts_do_not_move_images_nor_their_temperature(options, tmp_path, processor):
    it = alternating(tmp_path, processor, steps=5, weight_decay=0.1, **options)
    moves = Moves()
    it.add_callback(moves)
    it.train()
    everything = {name for name, _ in it.model.named_parameters()}
    texts = {name for name in everything if tower_of(name) == "text"}
    assert moves.gradients == [everything, texts, everything, texts, everything]
    assert moves.moved == moves.gradients


@pytest.mark.parametrize("options", [{"graph_memory": 0}, {}, {"gradient_accumulation_steps": 3}])
def test_the_gradient_cache_changes_nothing(options, tmp_path, processor):
    shared = {key: value for key, value in options.items() if key != "graph_memory"}
    whole = alternating(tmp_path / "whole", processor, optim="sgd", learning_rate=0.1, **shared)
    cut = alternating(
        tmp_path / "cut", processor, optim="sgd", learning_rate=0.1, text_chunk_size=3, image_chunk_size=3, **options
    )  # fmt: skip
    for it in (whole, cut):
        it.train()
    losses = [[entry["loss"] for entry in it.state.log_history if "loss" in entry] for it in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for (name, ours), theirs in zip(cut.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_an_even_accumulation_is_a_joint_step(tmp_path, processor, caplog):
    """The mean of the losses in place of their sum."""
    joint = alternating(tmp_path / "joint", processor, 2, alternate_modalities=False, optim="sgd", learning_rate=0.1,
                        max_grad_norm=1e9)  # fmt: skip
    added = alternating(tmp_path / "added", processor, 2, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.2,
                        max_grad_norm=1e9)  # fmt: skip
    assert "With gradient_accumulation_steps=2, each step adds up both modalities" in caplog.text
    for it in (joint, added):
        it.train()
    for (name, ours), theirs in zip(added.model.named_parameters(), joint.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_logs_are_of_the_steps_that_had_a_task(tmp_path, processor):
    every = alternating(tmp_path / "a", processor, 6)
    every.train()
    single = [entry for entry in every.state.log_history if "loss" in entry]
    assert [{"images", "a"} & {name[5:] for name in entry if name.startswith("loss/")} for entry in single] == [
        {"images"}, {"a"}
    ] * 3  # fmt: skip
    assert all("grad_norm/text" in entry for entry in single)
    assert ["grad_norm/image" in entry for entry in single] == [True, False] * 3, "no gradient, no norm"
    rare = alternating(tmp_path / "b", processor, 6, logging_steps=6)
    rare.train()
    (entry,) = (entry for entry in rare.state.log_history if "loss" in entry)
    for name, first in (("images", 0), ("a", 1)):
        mean = sum(one[f"loss/{name}"] for one in single[first::2]) / 3
        assert entry[f"loss/{name}"] == pytest.approx(mean, rel=1e-5)
    assert entry["loss"] == pytest.approx(sum(one["loss"] for one in single) / 6, rel=1e-5)
    assert entry["grad_norm/image"] == pytest.approx(single[4]["grad_norm/image"], rel=1e-4), "of the step before"
    assert entry["grad_norm/text"] == pytest.approx(single[5]["grad_norm/text"], rel=1e-4)
    assert rare.training_metrics.seen == 24


def test_a_loss_that_is_not_finite_names_its_task(tmp_path, processor):
    it = alternating(tmp_path, processor, 3)
    with torch.no_grad():
        it.model.text_projection.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss of task 'images' is nan at step 1"):
        it.train()


# Resuming


@pytest.mark.parametrize(("stream", "workers"), [(False, 0), (True, 2)])
def test_it_resumes_in_the_middle_of_a_pair(stream, workers, tmp_path, processor):
    def run(folder, resume=None, **options):
        it = alternating(
            folder, processor, 7, tasks=[captioned(stream=stream), pairs(stream=stream)], logging_steps=4,
            dataloader_num_workers=workers, **options,
        )  # fmt: skip
        it.train(resume_from_checkpoint=resume)
        return it

    whole = run(tmp_path / "a", save_strategy="steps", save_steps=3)
    again = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3"))
    for (name, ours), theirs in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs[1]), name
    logs = [[entry for entry in it.state.log_history if "loss" in entry] for it in (whole, again)]
    for name in ("loss", "loss/images", "loss/a", "grad_norm/image", "grad_norm/text"):
        assert logs[0][0][name] == logs[1][0][name], name


@pytest.fixture(scope="module")
def checkpoints(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alternating")
    for name, on in (("on", True), ("off", False)):
        alternating(folder / name, processor, 1, alternate_modalities=on, save_strategy="steps", save_steps=1).train()
    return {name: folder / name / "checkpoint-1" for name in ("on", "off")}


@pytest.mark.parametrize("earlier", [False, True])
def test_the_other_setting_does_not_resume(earlier, checkpoints, processor, tmp_path):
    for on, made in ((True, "off"), (False, "on")):
        if earlier and made == "off":
            forget_setting(checkpoints[made])
        it = alternating(tmp_path, processor, 2, alternate_modalities=on)
        with pytest.raises(TrainingError, match=f"alternate_modalities was {not on} and is now {on}"):
            it.restore_state(str(checkpoints[made]))


def test_a_checkpoint_of_an_earlier_version_resumes(checkpoints, processor, tmp_path):
    forget_setting(checkpoints["off"])
    it = alternating(tmp_path, processor, 2, alternate_modalities=False)
    it.train(resume_from_checkpoint=str(checkpoints["off"]))
    assert it.state.global_step == 2


def forget_setting(checkpoint) -> None:
    path = checkpoint / "bifocal_state_0.json"
    state = json.loads(path.read_text())
    state["signature"].pop("alternate_modalities", None)
    state["training_metrics"].pop("norms", None)
    path.write_text(json.dumps(state))


# Settings


def test_no_effect_is_said(tmp_path, processor, caplog):
    alternating(tmp_path, processor, tasks=[pairs()])
    assert "alternate_modalities has no effect: all tasks are of one modality (text)." in caplog.text


def test_steps_of_texts_must_train_something(tmp_path, processor):
    it = alternating(tmp_path, processor, freeze_text_tower=True)
    before = {name: p.detach().clone() for name, p in it.model.named_parameters()}
    it.train()
    moved = {name for name, p in it.model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if tower_of(name) == "text"} == {"text_projection.weight", "text_projection.bias"}
    without = BifocalModel(small_config(text_projection=False, projection_dim=48))
    with pytest.raises(TrainingError, match="makes steps of texts, but all that texts reach is frozen"):
        alternating(tmp_path, processor, model=without, freeze_text_tower=True)


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"deepspeed_plugin": object()}, {}, "does not work with DeepSpeed, which also moves weights without a grad"),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, {}, "FSDP 1, .*; set fsdp_version to 2"),
        ({}, {"ddp_find_unused_parameters": False}, "needs ddp_find_unused_parameters; remove it"),
        ({}, {"ddp_static_graph": True}, "does not work with ddp_static_graph"),
        ({}, {"activation_checkpointing_kwargs": {"use_reentrant": True}}, "needs use_reentrant=False"),
        ({}, {}, None),
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=2)}, {}, None),
    ],
)
def test_what_cannot_leave_weights_alone_is_refused(state, options, message, tmp_path):
    args = BifocalTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    accelerator = SimpleNamespace(state=SimpleNamespace(**state), num_processes=2)
    if message is None:
        return require_partial_gradients(args, accelerator)
    with pytest.raises(TrainingError, match=f"alternate_modalities .*{message}"):
        require_partial_gradients(args, accelerator)


# Recipes


def test_a_recipe_plans_trains_and_says_it(tmp_path, processor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    processor.save_pretrained(tmp_path / "processor")
    (tmp_path / "images").mkdir()
    for number in range(12):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(photo(32 + number, 32)))
    rows = [{"file_name": f"{number}.png", "caption": f"{TEXTS[number % 5]} {number}"} for number in range(12)]
    texts = [{"query": f"{text} {number}", "positive": text} for number in range(4) for text in TEXTS]
    for file, lines in (("images/metadata.jsonl", rows), ("pairs.jsonl", texts)):
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    tasks = [
        {"name": "images", "kind": "image-text", "data": {"path": "images"}, "batch_size": 4},
        {"name": "pairs", "kind": "text-pair", "data": {"path": "pairs.jsonl"}, "batch_size": 4},
    ]
    recipe = {
        "name": "mine", "processor": "processor", "device": "cpu", "max_length": 32, "tasks": tasks,
        "model": {"text_config": size, "vision_config": {**size, "image_size": 32, "patch_size": 8},
                  "projection_dim": 32},
        "training": {"max_steps": 5, "logging_steps": 1, "disable_tqdm": True},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train", "mine.yaml", "training.alternate_modalities=true"]
    planned = CliRunner().invoke(app, [*command, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "each batch holds one modality, images first, in turn (alternate_modalities)" in planned.stdout
    assert "12 rows, 4 a batch, 100% of the image batches, 1.00 passes" in planned.stdout
    assert "20 rows, 4 a batch, 100% of the text batches, 0.40 passes" in planned.stdout
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "runs" / "mine" / "stage.json").read_text())
    assert [step for step, _ in record["curves"]["images"]] == [1, 3, 5]
    card = (tmp_path / "runs" / "mine" / "model" / "README.md").read_text()
    assert "learning rate 5e-05, one modality in each batch, in turn." in card
    assert "(arXiv 2405.20204, section 3), except where they alternate." in card
    other = CliRunner().invoke(app, [*command[:2], "--dry-run"])
    assert "in turn" not in other.stdout
    assert "1.67 passes" in other.stdout
