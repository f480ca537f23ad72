"""All that is trained in two processes, one after the other: stages that leave parameters unused, and more.

torchrun --nproc-per-node 2 run_stages.py FOLDER
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, Dinov2Config

from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo
from tests.training import run_in_processes, run_sharded

ALTERNATING = "alternating"
IMAGES = [photo(32 + n, 32) for n in range(8)]


def images(name: str, batch: int, **options) -> Task:
    captions = [f"{name} {TEXTS[n % 5]} {n}" for n in range(8)]
    return Task(name, "image-text", Dataset.from_dict({"image": IMAGES, "caption": captions}), batch, **options)


def texts(batch: int) -> Task:
    queries = [f"{TEXTS[n % 5]} {n}" for n in range(8)]
    pairs = {"query": queries, "positive": [f"star {query}" for query in queries]}
    return Task("texts", "text-pair", Dataset.from_dict(pairs), batch)


def stages(batch: int) -> dict[str, tuple[list[Task], dict]]:
    """Tasks and arguments of each."""
    checkpointed = dict(activation_checkpointing=True)
    both = [images("learned", batch), texts(batch)]
    # Zeros in place of missing gradients would let Adam's momentum and the decay move the other tower.
    alternate = dict(alternate_modalities=True, optim="adamw_torch", adam_epsilon=1e-3, weight_decay=0.1)
    mixed = [images("learned", batch), images("fixed", batch, temperature=0.1)]
    return {
        "texts": ([texts(batch)], checkpointed),
        "texts, cached": ([texts(batch)], {**checkpointed, "text_chunk_size": 2}),
        "fixed temperature": ([images("fixed", batch, temperature=0.1)], checkpointed),
        "one learned, one fixed": (mixed, checkpointed),
        "one sigmoid, cached": (
            [images("nce", batch, loss="info_nce"), images("sigmoid", batch)],
            {**checkpointed, "text_chunk_size": 2},
        ),
        "lora": ([texts(batch)], checkpointed),
        "other towers": ([images("learned", batch), texts(batch)], {**checkpointed, "image_chunk_size": 1}),
        "best average": (
            [texts(batch)],
            dict(ema_decay=0.5, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                 load_best_model_at_end=True),
        ),
        "half": (
            [images("learned", batch), texts(batch)], dict(auto_find_chunk_size=True, gradient_accumulation_steps=2)
        ),
        ALTERNATING: (both, alternate),
        "alternating, cached": (both, {**alternate, **checkpointed, "text_chunk_size": 2, "image_chunk_size": 1}),
        "alternating, accumulated": (both, {**alternate, "text_chunk_size": 3, "gradient_accumulation_steps": 3}),
        "alternating, lora": (both, alternate),
    }  # fmt: skip


def run(name: str, out: Path, batch: int, processor: BifocalProcessor) -> MultiTaskTrainer:
    tasks, options = stages(batch)[name]
    torch.manual_seed(0)
    config = small_config(**({"logit_bias_init_value": -5.0} if "sigmoid" in name else {}))
    if name == "other towers":  # DINOv2 has a mask token that nothing uses
        size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout_prob=0.0)
        config = BifocalConfig(
            BertConfig(vocab_size=320, intermediate_size=48, attention_probs_dropout_prob=0.0, **size),
            Dinov2Config(image_size=32, patch_size=8, mlp_ratio=2, **size), projection_dim=32,
        )  # fmt: skip
    model = BifocalModel(config).to(torch.bfloat16 if name == "half" else torch.float32)
    if "lora" in name:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    settings = dict(
        output_dir=str(out / name.replace(" ", "-")), max_steps=4, learning_rate=1e-3, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=100, lr_scheduler_type="constant", optim="sgd",
    )  # fmt: skip
    arguments = BifocalTrainingArguments(**{**settings, **options})
    trainer = MultiTaskTrainer(model, arguments, tasks, processor, 32, eval_tasks=[texts(batch)])
    trainer.result = trainer.train()
    return trainer


def main() -> None:
    folder = Path(sys.argv[1])
    processor = BifocalProcessor.from_pretrained(folder / "processor")
    for case in run_in_processes.CASES:
        run_in_processes.train(folder, case, 2)
    results = {}
    for name in stages(2):
        if name == ALTERNATING:
            print(ALTERNATING, file=sys.stderr, flush=True)
        trainer = run(name, folder, 2, processor)
        if trainer.is_world_process_zero():
            results[name] = dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
        if name == "best average":
            measured = trainer.evaluate()["eval_loss"]
            assert abs(measured - trainer.state.best_metric) < 1e-6, (measured, trainer.state.best_metric)
        if name == "half":
            rate, seconds = (trainer.result.metrics[f"train_{n}"] for n in ("samples_per_second", "runtime"))
            results["rows"] = rate * seconds
    if trainer.is_world_process_zero():
        torch.save(results, folder / "stages.pt")
    run_sharded.steps(folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
