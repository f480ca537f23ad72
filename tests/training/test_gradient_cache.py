"""The gradient cache against a direct step: the same gradients, dropout included, in less memory."""

import pytest
import torch

from bifocal.modeling import BifocalModel
from bifocal.training.collator import MultiTaskCollator
from bifocal.training.engine.gradient_cache import cached_step, into_chunks
from bifocal.training.engine.joint_forward import embed
from bifocal.training.joint_batches import JointBatchDataset
from bifocal.training.losses.multi_task_loss import MultiTaskLoss
from tests.conftest import small_config
from tests.training.run_in_processes import tasks
from tests.training.test_trainer import trainer


def inputs_of(processor):
    parts = tasks(8, "text-triplet")
    collate = MultiTaskCollator(processor, 32, 0)
    return {task.name: task for task in parts}, collate([JointBatchDataset(parts, 1, 0)[0]])


def dropping_model() -> BifocalModel:
    torch.manual_seed(0)
    return BifocalModel(
        small_config(text_config={"hidden_dropout_prob": 0.2}, vision_config={"patch_dropout": 0.3})
    ).train()


class _Nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("text_rows", "image_rows"), [(3, 2), (5, None), (None, 3), (100, 100)])
def test_same_gradients_as_a_direct_step(processor, text_rows, image_rows, checkpointing):
    """The direct step embeds the same chunks, since a draw of dropout depends on the shape it is drawn for."""
    named, inputs = inputs_of(processor)
    objective = MultiTaskLoss(named)
    chunks = into_chunks(inputs["texts"], inputs["images"], text_rows, image_rows, both_last=checkpointing)
    direct, cached = dropping_model(), dropping_model()
    if checkpointing:
        cached.activation_checkpointing_enable()

    torch.manual_seed(7)
    parts = [embed(direct, *chunk) for chunk in chunks]
    joined = {name: torch.cat([part[name] for part in parts if name in part]) for name in ("texts", "images")}
    expected, _ = objective({**joined, "scale": parts[0]["scale"]}, inputs)
    expected.backward()
    drawn_after = torch.rand(1)

    torch.manual_seed(7)
    loss = cached_step(
        chunks,
        lambda texts, images: embed(cached, texts, images),
        lambda embedded: objective(embedded, inputs)[0],
        lambda scalar: scalar.backward(),
        _Nothing,
    )
    torch.testing.assert_close(loss, expected.detach())
    assert torch.equal(torch.rand(1), drawn_after), "the random state continues as after the direct step"
    for (name, left), right in zip(direct.named_parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert direct.logit_scale.grad.abs() > 0


def test_without_chunks_it_is_the_plain_forward(processor):
    """Also against an embedding of everything at once, where nothing is dropped."""
    named, inputs = inputs_of(processor)
    results = []
    for rows in (None, 4):
        torch.manual_seed(0)
        model = BifocalModel(small_config())
        objective = MultiTaskLoss(named)
        if rows is None:
            loss, _ = objective(embed(model, inputs["texts"], inputs["images"]), inputs)
            loss.backward()
        else:
            cached_step(
                into_chunks(inputs["texts"], inputs["images"], rows, rows),
                lambda texts, images, m=model: embed(m, texts, images),
                lambda embedded, o=objective: o(embedded, inputs)[0],
                lambda scalar: scalar.backward(),
                _Nothing,
            )
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, atol=1e-5, rtol=1e-5)


def test_chunks_cover_every_row_once(processor):
    _, inputs = inputs_of(processor)
    chunks = into_chunks(inputs["texts"], inputs["images"], 3, 5, both_last=True)
    assert max(len(part["input_ids"]) for texts, _ in chunks for part in texts) == 3
    assert max(len(part["pixel_values"]) for _, images in chunks for part in images) == 5
    assert sum(len(part["input_ids"]) for texts, _ in chunks for part in texts) == 8 + 8 * (2 + 3)
    assert torch.equal(
        torch.cat([p["pixel_values"] for _, i in chunks for p in i]), inputs["images"][0]["pixel_values"]
    )
    texts, images = chunks[-1]
    assert texts
    assert images, "the last pass takes part in both towers"
    apart = into_chunks(inputs["texts"], inputs["images"], 3, 5)
    assert len(apart) == len(chunks) + 1
    assert not any(texts and images for texts, images in apart)


def test_the_trainer_uses_it(tmp_path, processor):
    whole = trainer(tmp_path / "whole", processor, model=_new())
    whole.train()
    chunked = trainer(tmp_path / "chunked", processor, model=_new(), text_chunk_size=2, image_chunk_size=3)
    chunked.train()
    losses = [[entry["loss"] for entry in it.state.log_history if "loss" in entry] for it in (whole, chunked)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _new() -> BifocalModel:
    torch.manual_seed(0)
    return BifocalModel(small_config())


def test_bf16_and_checkpointing_compose(tmp_path, processor):
    it = trainer(
        tmp_path, processor, steps=20, model=dropping_model(), text_chunk_size=2, image_chunk_size=2, bf16=True,
        activation_checkpointing=True, learning_rate=2e-3,
    )  # fmt: skip
    seen = []
    it.model.text_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    it.train()
    assert set(seen) == {torch.bfloat16}, "autocast reaches the towers"
    losses = [entry["loss"] for entry in it.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_auto_chunk_says_what_it_chose(tmp_path, processor, caplog, monkeypatch):
    from bifocal.training.engine import chunk_size

    it = trainer(tmp_path, processor, steps=1, auto_find_chunk_size=True)
    it.train()
    assert (it.args.text_chunk_size, it.args.image_chunk_size) == (12, 4), "all of a small batch fits"
    assert "auto_find_chunk_size embeds 12 texts and 4 images at once" in caplog.text

    def sizes(free: int) -> tuple[int, int]:
        monkeypatch.setattr(chunk_size, "_free_memory", lambda device: free)
        parts = tasks(8, "text-triplet")
        return chunk_size.find_chunk_sizes(BifocalModel(small_config()), parts, 64, processor, it.args)

    assert sizes(0) == (1, 1)
    some, more = sizes(20 * 2**20), sizes(60 * 2**20)
    assert 1 <= some[0] <= more[0] <= 32
    assert some != more
