"""What a run of `MultiTaskTrainer` can be told beside its tasks."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class BifocalTrainingArguments(TrainingArguments):
    """transformers' arguments and those of training two towers together.

    Batch sizes are the tasks' own; `per_device_train_batch_size` is not used.

    Args:
        text_chunk_size, image_chunk_size: rows embedded at once through the gradient cache; None embeds all at once.
        auto_chunk: find both before training starts, the largest for which activations fit.
        text_learning_rate, image_learning_rate: of one tower; `learning_rate` when None.
        layer_decay: learning rates fall by this factor from each layer to the one below (1.0: they do not).
        freeze_text_layers, freeze_image_layers: embeddings and this many first layers keep their weights; -1 keeps the
            whole tower (LiT, arXiv 2111.07991), its projection left free.
        ema_decay: keep an exponential moving average of the weights; it is what the model holds after training.
        loss_form: "auto", "plain" or "tiled".
        exact_images: decode training pictures whole, as in evaluation, and not at reduced scale where that is faster
            (the mean difference is below 1 % of the range).
        loss_reduction: "sum" (the paper) or "mean" of the two directions of a loss.
    """

    text_chunk_size: int | None = field(default=None)
    image_chunk_size: int | None = field(default=None)
    auto_chunk: bool = field(default=False)
    text_learning_rate: float | None = field(default=None)
    image_learning_rate: float | None = field(default=None)
    layer_decay: float = field(default=1.0)
    freeze_text_layers: int = field(default=0)
    freeze_image_layers: int = field(default=0)
    ema_decay: float | None = field(default=None)
    loss_form: str = field(default="auto")
    loss_reduction: str = field(default="sum")
    exact_images: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # What the Trainer would remove are the columns of the tasks.
        self.remove_unused_columns = False
        for name in ("text_chunk_size", "image_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but it is {value}; None embeds a batch at once.")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be above 0 and at most 1, but it is {self.layer_decay}.")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be between 0 and 1, but it is {self.ema_decay}.")
