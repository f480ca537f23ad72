"""`MultiTaskTrainer`: transformers' Trainer for joint losses over images and texts, on one process or many."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.utils import logging

from bifocal.errors import TrainingError
from bifocal.modeling import BifocalProcessor
from bifocal.modeling.towers_bifocal import longest_text, padded_length
from bifocal.training.arguments import BifocalTrainingArguments, given_arguments, unsupported
from bifocal.training.callbacks.bookkeeping import Bookkeeping, in_order
from bifocal.training.callbacks.epochs import EpochEnds, set_steps, steps_per_epoch
from bifocal.training.callbacks.training_metrics import TrainingMetrics, norms_by_tower
from bifocal.training.collator import Augmentation, JointBatch, MultiTaskCollator, column_prompts
from bifocal.training.engine.chunk_size import find_chunk_sizes
from bifocal.training.engine.distributed import ProcessGroupInfo, require_partial_gradients, set_find_unused
from bifocal.training.engine.gradient_cache import cached_step, into_chunks
from bifocal.training.engine.graph_memory import GraphMemory
from bifocal.training.engine.joint_forward import (
    clamp_logit_scale,
    joint_forward,
    require_dual_encoder,
    temperature_of,
    touch_scalars,
)
from bifocal.training.eval_loss import evaluate_tasks, require_rows_by_number, task_list
from bifocal.training.joint_batches import JointBatchDataset, JointBatchStream
from bifocal.training.losses.multi_task_loss import MultiTaskLoss, TaskResult, with_default_loss
from bifocal.training.param_groups import (
    decaying,
    freeze,
    not_trained,
    parameter_groups,
    require_trained_by_texts,
    without_gradient,
)
from bifocal.training.precision import DTYPES, set_master_dtype
from bifocal.training.resuming import ResumableTrainer
from bifocal.training.setting_warnings import warn_of_settings
from bifocal.training.tasks import Task

logger = logging.get_logger(__name__)


class MultiTaskTrainer(ResumableTrainer):
    """Trains a dual encoder on several tasks together (arXiv 2405.20204, section 3).

    Each step takes one image-text batch and one text batch and the weighted sum of their losses, or one of the two in
    turn (`alternate_modalities`); a batch comes from one task (see `Task`). With chunk sizes in the arguments, batches
    of any size fit (gradient cache). The order of the batches is a function of `args.data_seed` (or `seed`) and the
    step, and where streams stand is part of a checkpoint, so `train(resume_from_checkpoint=...)` continues with the
    rows that follow, and refuses if they would be others.

    Every callback, checkpoint and reporting feature of the Trainer works; arguments that would have no effect are
    refused. `gradient_accumulation_steps` adds up the losses of that many batches, each with its own negatives only;
    for more negatives raise the tasks' batch sizes and set chunk sizes.

    Weights are trained in float32, also those of a model that is stored in 16 bits (see `master_dtype`). With
    `ema_decay`, evaluation measures the averaged weights, and the model files of checkpoints hold them. Parameters that
    no task reaches, such as the image tower in a stage of texts, want no gradient while `train` runs.

    Args:
        model: with `get_text_features` and `get_image_features`: `BifocalModel`, transformers' CLIP or SigLIP, or one
            of them under peft (by `peft.get_peft_model`; `model.add_adapter` of transformers 5.24 asks for a peft that
            is not released yet). Adapters leave the temperature as it is.
        args: `BifocalTrainingArguments`, or transformers' own, whose fields they take over.
        tasks: tasks to train on.
        processor: saved with every checkpoint; `model.processor` when None.
        max_length: tokens kept of a text, special tokens included: 77 in stage 1, 512 later (the paper); as many as
            the text tower takes when None.
        eval_tasks: tasks to evaluate on: the loss and the in-batch accuracy of each, and the sum of the losses as
            `eval_loss`.
        augment: applied to training images: an `ImageAugmentation`, or a function of an image and a random generator.
        callbacks: as for the Trainer, in any order: those with an attribute `adds_metrics = True`, as
            `EvaluationCallback` has, run before those that read metrics, and early stopping last.

    Attributes:
        steps_per_epoch: optimiser steps of an epoch (see `epochs`); None if a task streams without known rows.

    Raises:
        TrainingError: if there are no tasks or two with the same name, an argument would have no effect, or the model
            cannot do what a task needs.
    """

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
            args = BifocalTrainingArguments(**given_arguments(args))
        tasks, eval_tasks = task_list(tasks), task_list(eval_tasks or [], "eval_tasks")
        if not tasks:
            raise TrainingError("A stage needs at least one task; give MultiTaskTrainer tasks=[Task(...)].")
        require_rows_by_number(eval_tasks)
        processor = processor or getattr(model, "processor", None)
        require_dual_encoder(model, processor, [*tasks, *eval_tasks])
        assert processor is not None
        ignored = unsupported(args)
        if ignored is not None:
            raise TrainingError(ignored)
        if args.eval_strategy != "no" and not eval_tasks:
            raise TrainingError(f"eval_strategy='{args.eval_strategy.value}' needs eval_tasks to evaluate on.")
        has_bias = "bias" in temperature_of(model)
        tasks, eval_tasks = ([with_default_loss(task, has_bias) for task in part] for part in (tasks, eval_tasks))
        limit = getattr(model.config, "max_text_length", None)
        limit = limit or longest_text(getattr(model.config, "text_config", model.config))
        max_length = min(max_length or limit, limit)
        self.world = ProcessGroupInfo.current() if args.world_size > 1 else ProcessGroupInfo()
        accumulation, alternate = args.gradient_accumulation_steps, args.alternate_modalities
        self.steps_per_epoch = steps_per_epoch(tasks, self.world.size, accumulation, alternate)
        args = copy.copy(args)  # changes below are for these tasks only
        set_steps(args, self.steps_per_epoch, tasks)
        if args.n_gpu > 1:  # otherwise the Trainer wraps the model in DataParallel, which splits a batch's negatives
            logger.warning(f"Training uses one of {args.n_gpu} GPUs; start it with torchrun or accelerate to use all.")
            args._n_gpu = 1
        self.tasks = {task.name: task for task in tasks}
        self.eval_tasks = {task.name: task for task in eval_tasks}
        self.max_length = max_length
        self.frozen = freeze(
            model, args.freeze_text_layers, args.freeze_image_layers, args.freeze_text_tower, args.freeze_image_tower
        )
        before = set_master_dtype(model, DTYPES[args.master_dtype])
        batches, stream = args.max_steps * accumulation, any(task.streams for task in tasks)
        self.data_seed = seed = args.seed if args.data_seed is None else args.data_seed
        batches_of = JointBatchStream if stream else JointBatchDataset
        self.joint_batches: Any = batches_of(tasks, batches, seed, self.world, alternate)
        alternates = self.joint_batches.schedule.alternates
        set_find_unused(args, model, alternates)
        log = f"skipped-{self.world.rank}.jsonl" if self.world.rank else "skipped.jsonl"
        self.training_metrics = TrainingMetrics(self.world, self.tasks, Path(str(args.output_dir)) / log)
        self._positions, self._pending = {}, {}
        super().__init__(
            model=model,
            args=args,
            data_collator=MultiTaskCollator(  # type: ignore[arg-type]
                processor,
                max_length,
                seed,
                augment,
                self.world.rank,
                args.exact_image_decoding,
                skip=True,
                pad_to=padded_length(model.config),
                prompts=column_prompts(getattr(model.config, "prompts", None)),
            ),
            train_dataset=self.joint_batches,
            eval_dataset=list(self.eval_tasks.values()) or None,
            processing_class=processor,
            callbacks=[*(callbacks or []), Bookkeeping(self)],
        )
        if self.steps_per_epoch is not None:
            self.add_callback(EpochEnds(self.callback_handler, self.steps_per_epoch))
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "attach"):  # one that logs by itself
                callback.attach(self)
        self.order_callbacks()
        self.graphs = GraphMemory(model, self.args)
        self.joint_batches.decode = self.data_collator.image_reader.decode
        self.model_accepts_loss_kwargs = False  # the losses are means over the batch, not sums over its tokens
        self.can_return_loss = True
        # Where a forward pass is itself a collective, all processes must make as many.
        self.data_collator.bucketed = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if args.ema_decay is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise TrainingError("ema_decay does not work with FSDP or DeepSpeed; use DDP, or remove it.")
        if alternates:
            require_partial_gradients(self.args, self.accelerator)
            require_trained_by_texts(model)
        if self.world.is_main:
            warn_of_settings(self.args, self.model, tasks, before)

    def add_callback(self, callback: Any) -> None:
        """Add a callback as the Trainer does; the order does not matter."""
        super().add_callback(callback)
        added = self.callback_handler.callbacks[-1]
        if hasattr(added, "attach"):
            added.attach(self)
        self.order_callbacks()

    def order_callbacks(self) -> None:
        self.callback_handler.callbacks = in_order(self.callback_handler.callbacks)

    # The steps

    def get_train_dataloader(self) -> DataLoader:
        """Return a data loader in which one item is one step.

        A sampler of its own per item lets the Trainer skip finished steps without loading them.
        """
        context = getattr(self.args, "dataloader_multiprocessing_context", None)
        return DataLoader(
            self.joint_batches,
            batch_size=1,
            shuffle=False if not isinstance(self.joint_batches, JointBatchStream) else None,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=context if self.args.dataloader_num_workers else None,
        )

    def get_batch_samples(self, *arguments: Any) -> tuple[list, Any]:
        with self.training_metrics.waiting():
            return super().get_batch_samples(*arguments)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device) if isinstance(inputs, JointBatch) else super()._prepare_inputs(inputs)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: Any = None, **kwargs: Any
    ) -> Any:
        """Train as the Trainer does.

        Raises:
            TrainingError: if the checkpoint belongs to another model, or to a run that saw other rows.
        """
        if resume_from_checkpoint:
            self.restore_state(resume_from_checkpoint)
        if self.args.auto_find_chunk_size:
            self._choose_chunks()
        self.best_loaded = False
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in self.frozen)
        idle = [*self.frozen, *self.without_gradient()]
        try:
            with not_trained(self.model, idle), joint_forward(self.model):
                clamp_logit_scale(self.model)
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException:
            # A failure does not reach `on_train_end`: the bar would draw itself again over the message.
            for callback in self.callback_handler.callbacks:
                if getattr(callback, "training_bar", None) is not None:
                    callback.training_bar.close()
            raise

    def without_gradient(self) -> list[str]:
        """Return the names of the parameters that no task reaches (see `param_groups.without_gradient`)."""
        # Sharded weights do not support this test, so it is skipped.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        examples = None if sharded else self.data_collator.examples(next(self.model.parameters()).device)
        with self.accelerator.autocast():  # some attention takes 16 bits only
            return without_gradient(self.model, self.tasks.values(), examples)

    def _choose_chunks(self) -> None:
        sizes = find_chunk_sizes(
            self.model, self.tasks.values(), self.max_length, self.data_collator.processor, self.args
        )
        texts, images = self.world.smallest(sizes, self.args.device)
        self.args.text_chunk_size, self.args.image_chunk_size = texts, images
        if self.world.is_main:
            logger.warning(f"auto_find_chunk_size embeds {texts} texts and {images} images at once.")

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Add the gradients of a joint batch: one image-text batch, one text batch, the sum of their losses; or of one.

        Raises:
            FloatingPointError: if the loss is not finite; with the step, the task and its rows.
        """
        model.train()
        batch = self._prepare_inputs(inputs)
        self.note_position(batch)
        results: dict[str, TaskResult] = {}

        def forward(texts: Any, images: Any) -> dict[str, torch.Tensor]:
            return model(step_texts=texts, step_images=images)

        def loss_of(embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.autocast(self.args.device.type, enabled=False):
                loss, task_results = self.joint_loss(self.tasks, self.world)(embeddings, batch)
            self.require_finite(loss, task_results, batch)
            results.update(task_results)
            alone = self.joint_batches.schedule.alternates and not batch["images"]
            touched = 0.0 if alone else touch_scalars(embeddings)  # momentum would move the temperature
            return (loss + touched) / self.current_gradient_accumulation_steps

        if self._fits_in_one_pass(batch):
            with self.compute_loss_context_manager():
                loss = loss_of(forward(batch["texts"], batch["images"]))
            self.accelerator.backward(loss)
        else:
            text_rows, image_rows = self.args.text_chunk_size, self.args.image_chunk_size
            both_last = self.world.size > 1
            chunks = into_chunks(batch["texts"], batch["images"], text_rows, image_rows, both_last)
            # Sharding does not support several forward passes before a backward pass.
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            num_kept = 0 if sharded else self.graphs.num_kept(chunks, self.optimizer)
            num_kept = min(num_kept, len(chunks) - both_last)
            no_sync = partial(self.accelerator.no_sync, model)
            loss = cached_step(chunks, forward, loss_of, self.accelerator.backward, no_sync, num_kept)

        self.training_metrics.add(loss.detach(), results, batch)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss.detach()

    def joint_loss(self, tasks: dict[str, Task], world: ProcessGroupInfo) -> MultiTaskLoss:
        """Return the loss of joint batches of some tasks, with candidates from all processes of `world`."""
        return MultiTaskLoss(tasks, world, self.args.loss_impl, self.args.loss_reduction)

    def _fits_in_one_pass(self, batch: JointBatch) -> bool:
        """Return whether the batch needs no gradient cache.

        Raises:
            TrainingError: if it needs one under DeepSpeed.
        """
        texts, images = len(batch["order"]), sum(len(part["pixel_values"]) for part in batch["images"])
        fits = (self.args.text_chunk_size or texts) >= texts and (self.args.image_chunk_size or images) >= images
        if not fits and self.is_deepspeed_enabled:
            raise TrainingError("The gradient cache does not work with DeepSpeed; use DDP or FSDP, or no chunk sizes.")
        return fits

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a joint batch, all embedded at once; the outputs are the embeddings."""
        batch = self._prepare_inputs(inputs)
        with joint_forward(self.model):
            embeddings = model(step_texts=batch["texts"], step_images=batch["images"])
        loss, results = self.joint_loss(self.tasks, self.world)(embeddings, batch)
        return (loss, {"loss": loss, **embeddings, "results": results}) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        until_log = -(self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1))
        # Where batches alternate, the norm of a tower that the logged step does not reach is that of the step before.
        if until_log <= self.joint_batches.schedule.alternates:
            self.training_metrics.norms |= norms_by_tower(self.model)
        return super()._clip_grad_norm(model)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate knows one tower

    # Optimiser, weights

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return sorted(decaying(model))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return AdamW, or what `args.optim` names, over the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer(parameter_groups(model, self.args), **options)
        self.start_ema()
        return self.optimizer

    # Evaluation and logs

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss and in-batch accuracy of each evaluation task over all its rows (see `evaluate_tasks`).

        Args:
            eval_dataset: a `Task`, a list of them, or a dict of them by name; the trainer's `eval_tasks` if None.

        Returns:
            `eval_{task}_loss`, `eval_{task}_accuracy`, and `eval_loss`, the weighted sum of the losses.

        Raises:
            TrainingError: if there are no evaluation tasks, or they are not `Task`s.
        """
        tasks = list(self.eval_tasks.values()) if eval_dataset is None else eval_dataset
        tasks = task_list(tasks, "What is evaluated on")
        if not tasks:
            raise TrainingError("There is nothing to evaluate on; give the trainer eval_tasks.")
        require_rows_by_number(tasks)
        with self.averaged_weights():
            metrics = evaluate_tasks(self, tasks, metric_key_prefix)
            # Callbacks first: what an `EvaluationCallback` adds is logged, too.
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.log(metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to predict: a dual encoder embeds and predicts no labels.

        Raises:
            TrainingError: if called.
        """
        raise TrainingError(
            "MultiTaskTrainer has no labels to predict; embed with the model's encode_text and encode_image (or "
            "get_text_features and get_image_features), or score tasks with evaluate."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the training metrics since the last log, the learned temperature, and at the end the rows per second."""
        if "loss" in logs:
            logs |= self.training_metrics.take(self.args.device, self.args.gradient_accumulation_steps)
            scale = temperature_of(self.accelerator.unwrap_model(self.model)).get("scale")
            if scale is not None and not self.is_fsdp_enabled:
                logs["temperature"] = 1.0 / scale.item()
        if "train_samples_per_second" in logs:  # the Trainer counts by an argument that is not used here
            seen = self.training_metrics.total_seen(self.args.device)
            logs["train_samples_per_second"] = round(seen / max(logs["train_runtime"], 1e-4), 3)
        super().log(logs, *args, **kwargs)
