"""Fine-tune on a folder of images with captions and on a file of text pairs.

Run: python examples/finetune.py --steps 20
Prints the loss while training, and where the finished model is.
"""

import argparse

from bifocal import BifocalModel, BifocalTrainingArguments, MultiTaskTrainer, Task, export_model, load_source


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/model", help="a Bifocal folder or Hub id")
    parser.add_argument("--images", default="examples/data/images", help="a folder with metadata.jsonl")
    parser.add_argument("--pairs", default="examples/data/pairs.jsonl", help="rows with query and positive")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of each task per step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/finetune-example")
    options = parser.parse_args(arguments)

    trainer = MultiTaskTrainer(
        model=BifocalModel.from_pretrained(options.model),
        args=BifocalTrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            learning_rate=1e-4,
            auto_find_chunk_size=True,  # batches larger than memory, with exact gradients
            logging_steps=5,
            report_to="none",
        ),
        tasks=[
            Task("images", "image-text", load_source(options.images, "image-text"), options.batch_size),
            Task("pairs", "text-pair", load_source(options.pairs, "text-pair"), options.batch_size),
        ],
    )
    trainer.train()
    export_model(trainer.model, f"{options.out}/model")
    print(f"The model is in {options.out}/model.")


if __name__ == "__main__":
    main()
