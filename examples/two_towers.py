"""Join a text model and an image model, and train the image side into the text model's space.

Run: python examples/two_towers.py --text sentence-transformers/all-MiniLM-L6-v2 --image facebook/dinov2-small
Prints the loss while training, where the finished model is, and that text vectors are those of the text model.
"""

import argparse

import numpy as np

from bifocal import BifocalModel, BifocalTrainingArguments, MultiTaskTrainer, Task, load_source


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True, help="folder or Hub id of a text encoder")
    parser.add_argument("--image", required=True, help="folder or Hub id of an image encoder")
    parser.add_argument("--images", default="examples/data/images", help="a folder with metadata.jsonl")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/two-towers-example")
    options = parser.parse_args(arguments)

    model = BifocalModel.from_towers(text=options.text, image=options.image)  # one new layer, from images to texts
    before = model.encode_text("a black star")
    trainer = MultiTaskTrainer(
        model=model,
        args=BifocalTrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            learning_rate=1e-3,  # of the new layer
            image_learning_rate=1e-4,
            freeze_text_tower=True,  # texts keep their vectors
            layer_lr_decay=0.8,
            logging_steps=5,
            report_to="none",
        ),
        tasks=[Task("images", "image-text", load_source(options.images, "image-text"), options.batch_size)],
    )
    trainer.train()
    model.save_pretrained(f"{options.out}/model")
    model.processor.save_pretrained(f"{options.out}/model")
    print(f"The model is in {options.out}/model.")
    moved = float(np.abs(model.encode_text("a black star") - before).max())
    print(f"Text vectors moved by {moved:.1g}.")


if __name__ == "__main__":
    main()
