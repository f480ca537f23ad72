"""Index a folder of images, search it by text and by image, and serve a page.

Run: python examples/search.py "black star"
     python examples/search.py "black star" --serve
Prints the five nearest images. With --serve a page stands at http://127.0.0.1:7860 until Ctrl+C.

`bifocal index`, `bifocal search` and `bifocal serve` do the same, and keep an index up to date with its source.
"""

import argparse
from pathlib import Path

from bifocal.embedding.items import Item
from bifocal.embedding.models import load_model, weights_hash
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.page import build_page, launch
from bifocal.hub.search.searcher import Searcher


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", help="what to search for")
    parser.add_argument("--model", default="runs/demo/model", help="folder or Hub id of a dual encoder")
    parser.add_argument("--images", type=Path, default=Path("examples/data/images"), help="a folder of images")
    parser.add_argument("--out", default="runs/index-example", help="folder of the index")
    parser.add_argument("--serve", action="store_true", help="serve a page")
    options = parser.parse_args(arguments)

    model = load_model(options.model)
    weights = weights_hash(options.model)
    index = SearchIndex.create(options.out, options.model, weights, model.dimensions, prompts=model.prompts)
    searcher = Searcher(index, model)
    added = searcher.add(Item(path.name, image=path) for path in sorted(options.images.glob("*.png")))
    print(f"{added.new} images added, {added.known} known before")

    for hit in searcher.search(options.text, k=5):
        print(f"{hit.score:.3f} {hit.name}")
    if options.serve:
        launch(build_page(searcher))


if __name__ == "__main__":
    main()
