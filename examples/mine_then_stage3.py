"""Mine hard negatives for text pairs, then train on the triplets and on images, as stage 3 of the paper does.

Run: python examples/mine_then_stage3.py --steps 20
Prints one mined row, the loss while training, and where the finished model is.

Any sentence-transformers model can mine (--miner); a text retrieval model finds harder negatives than the demo's.
"""

import argparse

from sentence_transformers import SentenceTransformer

from bifocal import BifocalModel, BifocalTrainingArguments, MultiTaskTrainer, Task, export_model, load_source
from bifocal.training.mining import MiningSettings, mine_texts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/model", help="a Bifocal folder or Hub id")
    parser.add_argument("--miner", help="a sentence-transformers model; the model itself if omitted")
    parser.add_argument("--images", default="examples/data/images", help="a folder with metadata.jsonl")
    parser.add_argument("--pairs", default="examples/data/pairs.jsonl", help="rows with query and positive")
    parser.add_argument("--num-negatives", type=int, default=7, help="hard negatives for each pair")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of each task per step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/stage3-example")
    options = parser.parse_args(arguments)

    pairs = load_source(options.pairs, "text-pair")
    miner = SentenceTransformer(options.miner or options.model, trust_remote_code=True)
    triplets = mine_texts(pairs, miner, MiningSettings(num_negatives=options.num_negatives, range_max=20))
    row = triplets[0]
    print(f"{row['query']} -> {row['positive']}\n  not: {row['negatives'][0]}")

    trainer = MultiTaskTrainer(
        model=BifocalModel.from_pretrained(options.model),
        args=BifocalTrainingArguments(
            output_dir=options.out, max_steps=options.steps, learning_rate=2e-5, logging_steps=5, report_to="none"
        ),
        tasks=[
            Task("images", "image-text", load_source(options.images, "image-text"), options.batch_size),
            Task("triplets", "text-triplet", triplets, options.batch_size),
        ],
    )
    trainer.train()
    export_model(trainer.model, f"{options.out}/model")
    print(f"The model is in {options.out}/model.")


if __name__ == "__main__":
    main()
