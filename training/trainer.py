"""`MultiTaskTrainer`: transformers' Trainer for joint losses over pictures and texts, on one process or many."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from bifocal.modeling import BifocalProcessor
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.averaging import WeightAverage
from bifocal.training.batches import StepBatches, StepStream
from bifocal.training.chunk_size import find_chunk_sizes
from bifocal.training.collator import Augmentation, MultiTaskCollator, StepInputs
from bifocal.training.distributed import World
from bifocal.training.evaluating import evaluate_tasks, require_rows_by_number, task_list
from bifocal.training.gradient_cache import cached_step, into_chunks
from bifocal.training.joint_forward import joint_forward, padded_length, temperature_of
from bifocal.training.meters import Meters, norms_by_tower
from bifocal.training.objective import Objective
from bifocal.training.parameters import decays, freeze, parameter_groups
from bifocal.training.tasks import Task, TrainingError

logger = logging.get_logger(__name__)
STATE = "bifocal_state"


class _ClampLogitScale(TrainerCallback):
    """Keeps ln(1/tau) between 0 and its maximum, as CLIP does: beyond it the clamp in `forward` passes no gradient."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        scale = getattr(model, "logit_scale", None)
        if scale is not None and scale.requires_grad:
            with torch.no_grad():
                scale.clamp_(0.0, getattr(model.config, "logit_scale_max", 4.6052))


class MultiTaskTrainer(Trainer):
    """Trains a dual encoder on several tasks together (arXiv 2405.20204, section 3).

    Each step takes one image-text batch and one text batch and the weighted sum of their losses; a batch comes from one
    task (see `Task`). With chunk sizes in the arguments, batches of any size fit (gradient cache). The order of the
    batches is a function of `args.seed` and the step, and where streams stand is part of a checkpoint, so
    `train(resume_from_checkpoint=...)` goes on with the rows that follow.

    Every callback, checkpoint and reporting feature of the Trainer works. `gradient_accumulation_steps` adds up the
    losses of that many batches, each with its own negatives only; for more negatives raise the tasks' batch sizes and
    set chunk sizes.

    Args:
        model: with `get_text_features` and `get_image_features`: `BifocalModel`, transformers' CLIP or SigLIP, or one
            of them under peft.
        args: `BifocalTrainingArguments`, or transformers' own, whose fields they take over.
        tasks: what to train on.
        processor: saved with every checkpoint; `model.processor` when None.
        max_length: tokens kept of a text, special tokens included: 77 in stage 1, 512 later (the paper); as many as
            the text tower takes when None.
        eval_tasks: what to evaluate on: the loss and the in-batch accuracy of each, and the sum of the losses as
            `eval_loss`.
        augment: applied to training pictures.
        callbacks: as for the Trainer.

    Raises:
        TrainingError: `args.max_steps` not given, no tasks, or two of one name.
    """

    args: BifocalTrainingArguments
    model: Any
    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        tasks: Sequence[Task],
        processor: BifocalProcessor | None = None,
        max_length: int | None = None,
        eval_tasks: Sequence[Task] | None = None,
        augment: Augmentation | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(args, BifocalTrainingArguments):
            args = BifocalTrainingArguments(**_given(args))
        tasks, eval_tasks = task_list(tasks), task_list(eval_tasks or [], "eval_tasks")
        if not tasks:
            raise TrainingError("A stage needs at least one task; give MultiTaskTrainer tasks=[Task(...)].")
        require_rows_by_number(eval_tasks)
        processor = processor or getattr(model, "processor", None)
        _require_dual_encoder(model, processor, [*tasks, *eval_tasks])
        assert processor is not None
        if args.max_steps <= 0:
            raise TrainingError("MultiTaskTrainer counts steps, not epochs; set max_steps in the training arguments.")
        needs_bias = [task.name for task in tasks if task.loss == "sigmoid" and "bias" not in temperature_of(model)]
        if needs_bias:
            raise TrainingError(
                f"The sigmoid loss of task '{needs_bias[0]}' learns a bias, which this model has not; set "
                "logit_bias_init_value=-10.0 in its config."
            )
        text_config = getattr(model.config, "text_config", model.config)
        limit = text_config.max_position_embeddings
        max_length = min(max_length or limit, limit)
        self.world = World.current() if args.world_size > 1 else World()
        self.tasks = {task.name: task for task in tasks}
        self.eval_tasks = {task.name: task for task in eval_tasks}
        self.max_length = max_length
        self.frozen = freeze(model, args.freeze_text_layers, args.freeze_image_layers)
        batches = args.max_steps * args.gradient_accumulation_steps
        stream = any(task.streams for task in tasks)
        self.step_batches: Any = (StepStream if stream else StepBatches)(tasks, batches, args.seed, self.world)
        log = f"skipped-{self.world.rank}.jsonl" if self.world.rank else "skipped.jsonl"
        self.meters = Meters(self.world, self.tasks, Path(str(args.output_dir)) / log)
        self.average: WeightAverage | None = None
        self._positions: dict[int, dict[str, Any]] = {}
        self._restored_average: Path | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=MultiTaskCollator(  # type: ignore[arg-type]
                processor,
                max_length,
                args.seed,
                augment,
                self.world.rank,
                args.exact_images,
                True,
                padded_length(model.config),
            ),
            train_dataset=self.step_batches,
            eval_dataset=list(self.eval_tasks.values()) or None,
            processing_class=processor,
            callbacks=[*(callbacks or []), _ClampLogitScale()],
        )
        for callback in callbacks or []:
            if hasattr(callback, "attach"):  # one that logs by itself
                callback.attach(self)
        self.step_batches.decode = self.data_collator.pictures.decode
        self.model_accepts_loss_kwargs = False  # the losses are means over the batch, not sums over its tokens
        self.can_return_loss = True
        # Where a forward pass is itself a collective, all processes must make as many.
        self.data_collator.bucketed = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if args.gradient_accumulation_steps > 1:
            logger.warning(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} adds up losses whose negatives come "
                "from their own batch only; for more negatives raise batch_size of the tasks and set text_chunk_size "
                "and image_chunk_size."
            )

    # The steps

    def get_train_dataloader(self) -> DataLoader:
        """One item is one step. A sampler of its own per item lets the Trainer skip done steps without loading them."""
        return DataLoader(
            self.step_batches,
            batch_size=1,
            shuffle=False if not isinstance(self.step_batches, StepStream) else None,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, *arguments: Any) -> tuple[list, Any]:
        with self.meters.waiting():
            return super().get_batch_samples(*arguments)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device) if isinstance(inputs, StepInputs) else super()._prepare_inputs(inputs)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: Any = None, **kwargs: Any
    ) -> Any:
        """As the Trainer's.

        Raises:
            TrainingError: the checkpoint belongs to another model, or to another number of processes or workers.
        """
        if resume_from_checkpoint:
            self._restore(resume_from_checkpoint)
        if self.args.auto_chunk:
            self._choose_chunks()
        try:
            with joint_forward(self.model):
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException:
            # A failure does not reach `on_train_end`: the bar would draw itself again over the message.
            for callback in self.callback_handler.callbacks:
                if getattr(callback, "training_bar", None) is not None:
                    callback.training_bar.close()
            raise
        if self.average is not None:
            self.average.copy_to(self.accelerator.unwrap_model(self.model))
        return result

    def _choose_chunks(self) -> None:
        sizes = find_chunk_sizes(
            self.model, self.tasks.values(), self.max_length, self.data_collator.processor, self.args
        )
        texts, images = self.world.smallest(sizes, self.args.device)
        self.args.text_chunk_size, self.args.image_chunk_size = texts, images
        logger.warning(f"auto_chunk embeds {texts} texts and {images} images at once.")

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One batch of each sort, directly or through the gradient cache.

        Raises:
            FloatingPointError: a loss that is not finite, with the step, the task and its rows.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        if inputs["position"] is not None:
            worker, states = inputs["position"]
            self._positions[worker] = states
        accumulated = self.current_gradient_accumulation_steps
        results: dict[str, Any] = {}

        def objective(embedded: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.autocast(self.args.device.type, enabled=False):
                loss, found = self._objective()(embedded, inputs)
            results.update(found)
            self._require_finite(loss, found, inputs)
            return loss / accumulated

        def forward(texts: Any, images: Any) -> dict[str, torch.Tensor]:
            return model(step_texts=texts, step_images=images)

        text_rows, image_rows = self.args.text_chunk_size, self.args.image_chunk_size
        images = sum(len(part["pixel_values"]) for part in inputs["images"])
        if (text_rows or len(inputs["order"])) >= len(inputs["order"]) and (image_rows or images) >= images:
            with self.compute_loss_context_manager():
                loss = objective(forward(inputs["texts"], inputs["images"]))
            self.accelerator.backward(loss)
            loss = loss.detach()
        else:
            if self.is_deepspeed_enabled:
                raise TrainingError(
                    "The gradient cache does not work with DeepSpeed; use DDP or FSDP, or no chunk sizes."
                )
            loss = cached_step(
                into_chunks(inputs["texts"], inputs["images"], text_rows, image_rows, both_last=self.world.size > 1),
                forward,
                objective,
                self.accelerator.backward,
                lambda: self.accelerator.no_sync(model),
            )
        self.meters.add(loss, results, inputs)
        return loss

    def _objective(self) -> Objective:
        return Objective(self.tasks, self.world, self.args.loss_form, self.args.loss_reduction)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a step's inputs, all embedded at once; the outputs are the embeddings."""
        inputs = self._prepare_inputs(inputs)
        with joint_forward(self.model):
            embedded = model(step_texts=inputs["texts"], step_images=inputs["images"])
        loss, results = self._objective()(embedded, inputs)
        return (loss, {"loss": loss, **embedded, "results": results}) if return_outputs else loss

    def _require_finite(self, loss: torch.Tensor, results: dict[str, Any], inputs: StepInputs) -> None:
        """Stop before a step that would spoil the weights, and keep those from before it."""
        broken = not bool(torch.isfinite(loss))
        if self.world.size > 1:  # all stop together
            broken = self.world.mean([float(broken)], self.args.device)[0] > 0
        if not broken:
            return
        checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step and not checkpoint.exists():
            self._save_checkpoint(self.model, trial=None)
        name, value = next(
            ((n, r.loss.item()) for n, r in results.items() if not torch.isfinite(r.loss)),
            (next(iter(results)), float("nan")),
        )
        rows = inputs["tasks"][name].rows
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        where = f"; {checkpoint} has the weights from before it" if checkpoint.exists() else ""
        raise FloatingPointError(
            f"The loss of task '{name}' is {value} at step {self.state.global_step + 1} (rows {shown}){where}. Look at "
            "those rows, or lower the learning rate and resume."
        )

    def _clip_grad_norm(self, model: Any) -> Any:
        if (self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1)) == 0:
            self.meters.norms = norms_by_tower(self.model)
        return super()._clip_grad_norm(model)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate knows one tower

    # Optimiser, weights

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, parameter in model.named_parameters() if decays(name, parameter)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, or what `args.optim` names, over the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer(parameter_groups(model, self.args), **options)
        if self.args.ema_decay is not None and self.average is None:
            self.average = WeightAverage(self.model, self.args.ema_decay)
            if self._restored_average is not None:
                self.average.load(self._restored_average)
            self.add_callback(self.average)
        return self.optimizer

    # Checkpoints

    def _save_rng_state(self, output_dir: str) -> None:
        """Also what the Trainer does not know: where the streams stand, sums not yet logged, averaged weights."""
        super()._save_rng_state(output_dir)
        state = {
            "processes": self.world.size,
            "workers": self.args.dataloader_num_workers,
            "positions": self._positions,
            "meters": self.meters.state(),
        }
        path = Path(output_dir) / f"{STATE}_{self.world.rank}.json"
        path.write_text(json.dumps(state), encoding="utf-8")
        if self.average is not None and self.args.should_save:
            self.average.save(Path(output_dir))

    def _restore(self, checkpoint: Any) -> None:
        from transformers.trainer_utils import get_last_checkpoint

        found = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        path = Path(str(found or self.args.output_dir)) / f"{STATE}_{self.world.rank}.json"
        if not path.exists():
            return  # another trainer's; its weights and optimiser still serve
        state = json.loads(path.read_text(encoding="utf-8"))
        streams = isinstance(self.step_batches, StepStream)
        now = {"processes": self.world.size, "workers": self.args.dataloader_num_workers}
        if streams and any(state[name] != value for name, value in now.items()):
            raise TrainingError(
                f"{found} was made with {state['processes']} processes of {state['workers']} data workers, and streams "
                "cannot go on exactly with another number of either; start this run with the same."
            )
        self.meters.load_state(state["meters"])
        self._positions = {int(worker): position for worker, position in state["positions"].items()}
        if streams:
            done = json.loads((Path(found) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
            self.step_batches.start = done * self.args.gradient_accumulation_steps
            self.step_batches.positions = self._positions
        if self.args.ema_decay is not None:
            self._restored_average = Path(found)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error) and "Missing key" not in str(error):
                raise
            raise TrainingError(
                f"{resume_from_checkpoint} is a checkpoint of another model ({_first_line(error)}); resume with the "
                "model it was made with, or start anew."
            ) from error

    # Evaluation and logs

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss and in-batch accuracy of each evaluation task over all its rows (see `evaluate_tasks`).

        Args:
            eval_dataset: a `Task`, a list of them, or a dict of them by name; the trainer's `eval_tasks` when None.

        Returns:
            `eval_{task}_loss`, `eval_{task}_accuracy`, and `eval_loss`, the weighted sum of the losses.

        Raises:
            TrainingError: if there are no evaluation tasks, or they are not `Task`s.
        """
        given = list(self.eval_tasks.values()) if eval_dataset is None else eval_dataset
        tasks = task_list(given, "What is evaluated on")
        if not tasks:
            raise TrainingError("There is nothing to evaluate on; give the trainer eval_tasks.")
        require_rows_by_number(tasks)
        metrics = evaluate_tasks(self, tasks, metric_key_prefix)
        # Callbacks first: an `EvaluationCallback` adds what it finds, and that is logged, too.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.log(metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            TrainingError: always; a dual encoder embeds, it predicts no labels.
        """
        raise TrainingError(
            "MultiTaskTrainer has no labels to predict; embed with the model's encode_text and encode_image (or "
            "get_text_features and get_image_features), or score tasks with evaluate."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the meters saw since the last log, and the learned temperature."""
        if "loss" in logs:
            logs |= self.meters.take(self.args.device, self.args.gradient_accumulation_steps)
            scale = temperature_of(self.accelerator.unwrap_model(self.model)).get("scale")
            if scale is not None and not self.is_fsdp_enabled:
                logs["temperature"] = 1.0 / scale.item()
        super().log(logs, *args, **kwargs)


def _require_dual_encoder(model: Any, processor: Any, tasks: Sequence[Task]) -> None:
    """
    Raises:
        TrainingError: if the model cannot embed what the tasks hold, or nothing prepares its inputs.
    """
    methods = ["get_text_features", *(["get_image_features"] if any(task.sort == "image" for task in tasks) else [])]
    missing = next((method for method in methods if not callable(getattr(model, method, None))), None)
    if missing is not None:
        raise TrainingError(
            f"A {type(model).__name__} has no {missing}; MultiTaskTrainer trains dual encoders, such as BifocalModel, "
            "CLIPModel or SiglipModel."
        )
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            has = "The model comes without a processor" if processor is None else f"The processor has no {part}"
            raise TrainingError(f"{has}; pass processor=..., such as CLIPProcessor.from_pretrained(folder).")


def _given(args: Any) -> dict[str, Any]:
    """The fields of transformers' arguments that are not at their default, as given to a new object."""
    import dataclasses

    given = {}
    for item in dataclasses.fields(args):
        if item.init and getattr(args, item.name) != item.default:
            given[item.name] = getattr(args, item.name)
    return given


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]
