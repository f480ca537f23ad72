"""Train low-rank adapters (LoRA) instead of all weights, and export the model with the adapters merged into it.

Run: python examples/lora.py --steps 20
Prints how many parameters are trained, the loss while training, and where the merged model is.
"""

import argparse

from peft import LoraConfig, get_peft_model

from bifocal import BifocalModel, BifocalTrainingArguments, MultiTaskTrainer, Task, export_model, load_source
from bifocal.training.towers import linear_layers


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/model", help="a Bifocal folder or Hub id")
    parser.add_argument("--images", default="examples/data/images", help="a folder with metadata.jsonl")
    parser.add_argument("--pairs", default="examples/data/pairs.jsonl", help="rows with query and positive")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of each task per step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/lora-example")
    options = parser.parse_args(arguments)

    base = BifocalModel.from_pretrained(options.model)
    adapters = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=linear_layers(base))
    model = get_peft_model(base, adapters)
    model.print_trainable_parameters()

    trainer = MultiTaskTrainer(
        model=model,
        args=BifocalTrainingArguments(
            output_dir=options.out, max_steps=options.steps, learning_rate=1e-3, logging_steps=5, report_to="none"
        ),
        tasks=[
            Task("images", "image-text", load_source(options.images, "image-text"), options.batch_size),
            Task("pairs", "text-pair", load_source(options.pairs, "text-pair"), options.batch_size),
        ],
    )
    trainer.train()
    export_model(trainer.model, f"{options.out}/model")  # merges the adapters into a copy
    print(f"The model is in {options.out}/model.")


if __name__ == "__main__":
    main()
