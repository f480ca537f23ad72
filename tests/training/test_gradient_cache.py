"""The gradient cache against a direct step: the same gradients, dropout included, in less memory."""

import pytest
import torch

from bifocal.modeling import BifocalModel, alibi_bifocal
from bifocal.training.collator import MultiTaskCollator
from bifocal.training.engine import activation_memory
from bifocal.training.engine.activation_memory import free_memory, kept_for_backward
from bifocal.training.engine.chunk_size import kept_per_row
from bifocal.training.engine.gradient_cache import cached_step, into_chunks
from bifocal.training.engine.graph_memory import GIB, GraphMemory
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


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("text_rows", "image_rows"), [(3, 2), (5, None), (None, 3), (100, 100)])
def test_same_gradients_as_a_direct_step(processor, text_rows, image_rows, checkpointing, share):
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
    passes = []

    def forward(texts, images):
        passes.append(torch.is_grad_enabled())
        return embed(cached, texts, images)

    num_kept = int(share * len(chunks))
    loss = cached_step(
        chunks,
        forward,
        lambda embedded: objective(embedded, inputs)[0],
        lambda scalar: scalar.backward(),
        _Nothing,
        num_kept,
    )
    assert passes.count(True) == len(chunks)
    assert passes.count(False) == len(chunks) - num_kept, "only chunks without a graph are embedded twice"
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


def losses_and_passes(it) -> tuple[list[float], list[int]]:
    """Train, and return the losses and the number of forward passes of each step."""
    passes = []
    it.model.register_forward_pre_hook(lambda *_: passes.append(it.state.global_step))
    it.train()
    losses = [entry["loss"] for entry in it.state.log_history if "loss" in entry]
    return losses, [passes.count(step) for step in range(it.state.max_steps)]


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2, "ema_decay": 0.5}])
def test_the_trainer_keeps_what_fits(tmp_path, processor, monkeypatch, options):
    """The results do not depend on how many chunks keep their graph, nor do the random draws."""
    found = {}
    some = 2**20 / GIB
    for memory in (0, some, "auto", "nothing free"):
        if memory == "nothing free":
            monkeypatch.setattr("bifocal.training.engine.graph_memory.free_memory", lambda device: 0)
        it = trainer(
            tmp_path / str(memory), processor, model=dropping_model(), text_chunk_size=3, image_chunk_size=2,
            graph_memory="auto" if memory == "nothing free" else memory, logging_steps=1, **options,
        )  # fmt: skip
        found[memory] = losses_and_passes(it)
    losses, twice = found[0]
    for others, _ in found.values():
        assert others == pytest.approx(losses, abs=1e-5)
    assert found["nothing free"][1] == twice
    once = found["auto"][1]
    assert [2 * passes for passes in once] == twice
    assert sum(once) < sum(found[some][1]) < sum(twice)


def chunks_and_memory(processor, tmp_path, **options):
    """Return chunks of different lengths, most of them padded, and what counts their memory."""
    rows = [[7] * length for length in (30, 30, 29, 28, 27, 14, 13, 12, 12, 5, 4)]
    parts = []
    for bucket in (rows[:5], rows[5:9], rows[9:]):
        ids = torch.zeros(len(bucket), len(bucket[0]), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(bucket):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        parts.append({"input_ids": ids, "attention_mask": mask})
    chunks = into_chunks(parts, [{"pixel_values": torch.randn(5, 3, 32, 32)}], 4, 2)
    args = trainer(tmp_path, processor, **options).args
    return chunks, GraphMemory(dropping_model(), args)


def bytes_kept(graphs: GraphMemory, chunks) -> int:
    """Return what autograd keeps of several chunks at once, counted by distinct memory."""
    inputs = [value for part in chunks for kind in part for entry in kind for value in entry.values()]
    own = {t.untyped_storage().data_ptr() for t in (*graphs.model.parameters(), *inputs)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    class SharedBias(alibi_bifocal.AlibiBias):
        """Checkpointed layers hold the bias itself, which no hook of autograd sees."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            if graphs.model.is_gradient_checkpointing and self.whole is not None:
                keep(self.whole)
                held.append(self)

    outputs, held = [], []
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=graphs.args.bf16),
    ):
        patch.setattr("bifocal.modeling.modeling_bifocal_text.AlibiBias", SharedBias)
        for texts, images in chunks:
            outputs.append(embed(graphs.model, texts, images))
    if outputs:
        sum(value.sum() for output in outputs for value in output.values()).backward()
    return sum(kept.values())


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"checkpointing": True}, {"attention": "eager"}])
def test_the_bound_is_kept(processor, tmp_path, options):
    settings = {key: value for key, value in options.items() if key == "bf16"}
    chunks, graphs = chunks_and_memory(processor, tmp_path, **settings)
    if "checkpointing" in options:
        graphs.model.activation_checkpointing_enable()
    if "attention" in options:
        graphs.model.set_attn_implementation(options["attention"])
    assert len(chunks) == 2 + 1 + 1 + 3
    drawn = torch.get_rng_state()
    graphs.args.graph_memory = 1.0
    assert graphs.num_kept(chunks) == len(chunks)
    assert torch.equal(torch.get_rng_state(), drawn), "measuring draws nothing"
    assert all(parameter.grad is None for parameter in graphs.model.parameters())
    total = bytes_kept(graphs, chunks)
    counts = set()
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        graphs.args.graph_memory = share * total / GIB
        count = graphs.num_kept(chunks)
        counts.add(count)
        assert bytes_kept(graphs, chunks[:count]) <= share * total
        if count < len(chunks) - 1:
            assert bytes_kept(graphs, chunks[: count + 2]) > share * total, "as many as fit, but for one at most"
    assert len(counts) >= 4
    graphs.args.graph_memory = 0.0
    assert graphs.num_kept(chunks) == 0


def test_what_is_free_counts_gradients_and_optimiser_states_to_come(processor, tmp_path, monkeypatch):
    _, graphs = chunks_and_memory(processor, tmp_path)
    monkeypatch.setattr("bifocal.training.engine.graph_memory.free_memory", lambda device: 10 * 2**20)
    weights = sum(p.numel() * p.element_size() for p in graphs.model.parameters())
    optimizer = torch.optim.AdamW(graphs.model.parameters())
    assert graphs.limit(optimizer) == pytest.approx(0.6 * (10 * 2**20 - 3 * weights))
    for parameter in graphs.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert graphs.limit(optimizer) == pytest.approx(0.6 * 10 * 2**20)


def test_measuring_leaves_batch_normalisation_alone(processor, tmp_path):
    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)

        def get_image_features(self, pixel_values):
            return self.norm(pixel_values)

    model = Towers()
    args = trainer(tmp_path, processor).args
    assert kept_for_backward(model, [], [{"pixel_values": torch.randn(6, 4)}], args) > 0
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(4))


def texts_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("between", [1, 2, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_estimates_hold_where_attention_changes_its_way(processor, tmp_path, monkeypatch, between, attention):
    """A row more may be the first whose bias is not held whole; a difference of two counts then says nothing."""
    model, length = dropping_model(), 32
    model.set_attn_implementation(attention)
    heads = model.config.text_config.num_attention_heads
    monkeypatch.setattr(alibi_bifocal, "_LARGEST_WHOLE", int((between + 0.5) * heads * length * length))
    monkeypatch.setattr(alibi_bifocal, "_LONG", 8)
    args = trainer(tmp_path, processor).args
    graphs = GraphMemory(model, args)
    kept = {rows: kept_for_backward(model, [texts_of(rows, length)], [], args) for rows in (1, 8)}
    assert graphs.kept_bytes("text", texts_of(8, length)) >= kept[8]
    assert graphs.kept_bytes("text", texts_of(1, length)) >= kept[1]
    assert kept_per_row(model, length, processor, args)[0] >= 0.999 * (kept[8] - kept[1]) / 7


def test_a_bias_that_checkpointed_layers_share_is_counted(processor, tmp_path):
    model, length = dropping_model(), 64
    args = trainer(tmp_path, processor).args
    model.activation_checkpointing_enable()
    two, three = (kept_for_backward(model, [texts_of(rows, length)], [], args) for rows in (2, 3))
    bias_of_a_row = 4 * model.config.text_config.num_attention_heads * length**2
    states_of_a_row = 4 * model.config.text_config.hidden_size * length
    assert three - two >= bias_of_a_row + states_of_a_row
    assert not model.text_model.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_knows_the_limit_of_a_container(tmp_path, monkeypatch, version):
    monkeypatch.setattr(activation_memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(activation_memory, "_OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/pod/job\n" if version == 2 else "9:name=systemd:/\n4:memory:/pod/job\n0::/\n")
    folder = tmp_path / "cgroup" / ("pod" if version == 2 else "memory/pod")
    (folder / "job").mkdir(parents=True)  # the limit is that of the group around
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{64 * 2**20}\n")
    (folder / names[1]).write_text(f"{40 * 2**20}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {8 * 2**20}\n")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory(torch.device("cpu")) == 32 * 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 8 * 2**20, "processes of one machine share its memory"
    (folder / names[1]).write_text(f"{80 * 2**20}\n")
    assert free_memory(torch.device("cpu")) == 0


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
        monkeypatch.setattr(chunk_size, "free_memory", lambda device: free)
        parts = tasks(8, "text-triplet")
        return chunk_size.find_chunk_sizes(BifocalModel(small_config()), parts, 64, processor, it.args)

    assert sizes(0) == (1, 1)
    some, more = sizes(20 * 2**20), sizes(60 * 2**20)
    assert 1 <= some[0] <= more[0] <= 32
    assert some != more
