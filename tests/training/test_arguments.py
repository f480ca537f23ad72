"""Every argument of transformers works, is refused with what to do instead, or is known to change nothing."""

import dataclasses

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from bifocal.modeling import BifocalModel
from bifocal.training.arguments import UNSUPPORTED, BifocalTrainingArguments
from bifocal.training.callbacks.epochs import steps_per_epoch
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.conftest import small_config
from tests.training.test_signature import pairs
from tests.training.test_trainer import image_task, trainer

WORKS = """
    output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16
    tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica logging_dir
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start save_only_model save_strategy save_steps save_on_each_node
    save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics local_rank
"""
# What they speak of does not exist here: columns, predictions, losses by tokens, losses that are not finite, a cache of
# keys, incomplete batches; or only scripts read them.
HARMLESS = """
    average_tokens_across_devices use_cache logging_nan_inf_filter prediction_loss_only eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps dataloader_drop_last remove_unused_columns label_names
    length_column_name do_train do_eval do_predict resume_from_checkpoint
"""


def test_every_argument_is_known():
    named = {item.name for item in dataclasses.fields(TrainingArguments)}
    classes = [set(WORKS.split()), set(HARMLESS.split()), set(UNSUPPORTED)]
    assert named - set().union(*classes) == set(), "new in this release: find out what they do in MultiTaskTrainer"
    assert sum(map(len, classes)) == len(set().union(*classes)), "each in one list"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"per_device_train_batch_size": 64}, "per_device_train_batch_size=64 has no effect .*batch_size of each task"),
        ({"label_smoothing_factor": 0.1}, "set label_smoothing of each task"),
        ({"train_sampling_strategy": "group_by_length"}, "sorted by length within each batch"),
        ({"ignore_data_skip": True}, "skipped without being loaded"),
        ({"auto_find_batch_size": True}, "set auto_find_chunk_size=True"),
        ({"include_num_input_tokens_seen": "all"}, "the log has tokens_per_second"),
        ({"bf16_full_eval": True}, "in the dtype of the weights"),
        ({"include_for_metrics": ["inputs"]}, "use an EvaluationCallback"),
        ({"eval_strategy": "steps"}, "eval_strategy='steps' needs eval_tasks"),
        ({"optim": "lomo"}, "optim='lomo' is not supported"),
        ({"accelerator_config": {"split_batches": True}}, "each process makes its own batches"),
        ({"report_to": "tensorboard"}, "report_to names 'tensorboard', which is not installed here"),
    ],
)
def test_what_would_be_ignored_is_refused(option, message, tmp_path, processor, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, processor, **option)


def test_neftune_and_compilation_do_something(tmp_path, processor):
    losses = {}
    for name, options in {
        "plain": {}, "noise": {"neftune_noise_alpha": 5.0}, "compiled": {"torch_compile_backend": "eager"},
    }.items():  # fmt: skip
        losses[name] = trainer(tmp_path, processor, steps=2, tasks=[pairs()], **options).train().training_loss
    assert losses["noise"] > losses["plain"] + 1e-3
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5)


def test_the_length_of_an_epoch():
    one, two = pairs(batch_size=5), pairs("b", batch_size=10, sampling_weight=3.0)  # 20 rows each: 4 batches and 2
    assert steps_per_epoch([one], 1, 1) == 4
    assert steps_per_epoch([one], 2, 1) == 2
    assert steps_per_epoch([one, two], 1, 1) == 6, "all batches of the texts, whatever their weights"
    assert steps_per_epoch([one, two], 1, 4) == 2
    assert steps_per_epoch([image_task(), one, two], 1, 1) == 6, "one batch of images is passed through six times"
    assert steps_per_epoch([image_task(), two], 4, 1) == 1
    assert steps_per_epoch([pairs(stream=True)], 1, 1) is None
    assert steps_per_epoch([pairs(stream=True, num_rows=80)], 1, 1) == 20


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.seen.append(("begin", state.global_step))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seen.append(("end", state.global_step, state.epoch))

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(("save", state.global_step))

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append(("evaluate", state.global_step))


def test_epochs_as_transformers_users_know_them(tmp_path, processor):
    """20 rows in batches of 4: five steps an epoch, each row once in it."""

    def run(folder, resume=None):
        it = trainer(
            folder, processor, steps=-1, num_train_epochs=2.4, tasks=[pairs()], eval_tasks=[pairs()],
            eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", load_best_model_at_end=True,
        )  # fmt: skip
        events = Events()
        it.add_callback(events)
        it.seen_rows = []
        add = it.training_metrics.add
        it.training_metrics.add = lambda *given: (it.seen_rows.extend(given[2]["tasks"]["a"].rows), add(*given))
        it.train(resume_from_checkpoint=resume)
        return it, events.seen

    it, seen = run(tmp_path / "a")
    assert it.state.max_steps == it.state.global_step == 12
    assert it.state.num_train_epochs == 3
    assert seen == [
        ("begin", 0), ("end", 5, 1.0), ("begin", 5), ("evaluate", 5), ("save", 5),
        ("end", 10, 2.0), ("begin", 10), ("evaluate", 10), ("save", 10),
        ("end", 12, 2.4), ("evaluate", 12), ("save", 12),
    ]  # fmt: skip
    assert sorted(it.seen_rows[:20]) == sorted(it.seen_rows[20:40]) == list(range(20))
    assert [entry["epoch"] for entry in it.state.log_history if "loss" in entry] == [1.0, 2.0, 2.4]
    again, seen = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-5"))
    assert [event for event in seen if event[0] != "begin"][:2] == [("end", 10, 2.0), ("evaluate", 10)]
    assert again.seen_rows == it.seen_rows[20:]


def test_epochs_of_streams_are_refused(tmp_path, processor):
    with pytest.raises(ValueError, match="eval_strategy='epoch' has no meaning, since task 'a' streams"):
        trainer(tmp_path, processor, tasks=[pairs(stream=True)], eval_tasks=[pairs()], eval_strategy="epoch")


def test_the_closing_line_counts_rows(tmp_path, processor):
    result = trainer(tmp_path, processor, steps=6, gradient_accumulation_steps=2, tasks=[image_task(), pairs()]).train()
    metrics = result.metrics
    rows = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert rows == pytest.approx(6 * 2 * (4 + 4), rel=0.02)


def test_arguments_may_be_used_again(tmp_path, processor):
    args = BifocalTrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    steps = []
    for task in (pairs(), Task("a", "text-pair", pairs().dataset, 10)):
        steps.append(MultiTaskTrainer(BifocalModel(small_config()), args, [task], processor).args.max_steps)
    assert steps == [5, 2]


def test_one_gpu_is_used_without_a_launcher(tmp_path, processor, caplog):
    args = BifocalTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    args._n_gpu = 2
    it = MultiTaskTrainer(BifocalModel(small_config()), args, [pairs()], processor)
    assert "uses one of 2 GPUs; start it with torchrun" in caplog.text
    assert it.args.n_gpu == 1
    assert it.args.train_batch_size == 8


def test_early_stopping_at_the_end_of_an_epoch_measures_it_once(tmp_path, processor):
    it = trainer(
        tmp_path, processor, steps=-1, num_train_epochs=4, tasks=[pairs()], eval_tasks=[pairs()], learning_rate=0.0,
        eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )  # fmt: skip
    events = Events()
    it.add_callback(events)
    it.add_callback(EarlyStoppingCallback(1))
    it.train()
    assert it.state.global_step == 10
    seen = [event for event in events.seen if event[0] in ("evaluate", "save")]
    assert seen == [("evaluate", 5), ("save", 5), ("evaluate", 10), ("save", 10)]
