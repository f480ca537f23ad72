"""Size, load time and query time of a page of `bifocal serve --static` in headless Chromium.

Run: python benchmarks/static_site.py [--items 100000] [--dimensions 512] [--width 768] [--layers 12] [--rounds 3]

Prints one JSON line: megabytes of the folder by part; the seconds until the page can search, in a new browser and with
the folder on this machine; and the median milliseconds of a search by a text of some ten tokens: to embed the text, to
rank all items, and all in all until the page has the hits with their thumbnails. Weights and vectors are random; the
text tower has the shape of BERT base by default. Half of the items are images with thumbnails of 128 x 128 pixels.
"""

import argparse
import functools
import hashlib
import http.server
import io
import json
import shutil
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

TEXTS = [
    f"{what} {where}" for what in ("two boats", "an old red car", "some kites") for where in ("at dusk", "in snow")
]
SEARCH = """async text => {
    const start = performance.now();
    const {milliseconds} = await client.search({text, k: 12, rankings: [["image", "text"]]});
    return [milliseconds.embed, milliseconds.rank, performance.now() - start];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("items", 100_000), ("dimensions", 512), ("width", 768), ("layers", 12), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()

    from bifocal.hub.static_site.site import write_site

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        summary = write_site(make_index(folder, options), folder / "site", "Benchmark")
        loads, searches = measure(folder / "site", options.rounds)
    line: dict[str, Any] = {"benchmark": "static_site", **vars(options)}
    line["megabytes"] = {part: round(size / 1e6, 1) for part, size in summary.sizes.items()}
    line["load_s"] = round(statistics.median(loads), 2)
    for name, times in zip(("embed_ms", "rank_ms", "search_ms"), zip(*searches, strict=True), strict=True):
        line[name] = round(statistics.median(times), 1)
    print(json.dumps(line))


def make_index(folder: Path, options: argparse.Namespace) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    from bifocal.embedding.items import normalize, thumbnail
    from bifocal.embedding.models import weights_hash
    from bifocal.hub.export import export_model
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.table import Occurrence
    from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
    from bifocal.modeling.processing_bifocal import image_processor_of_size
    from bifocal.training.tokenizer import train_wordpiece

    torch.manual_seed(0)
    text = dict(
        hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
        intermediate_size=4 * options.width, vocab_size=30_522, max_position_embeddings=512,
    )  # fmt: skip
    vision = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, image_size=32)
    config = BifocalConfig(
        text_config=text, vision_config={**vision, "patch_size": 16}, projection_dim=options.dimensions,
        text_projection=True,
    )  # fmt: skip
    processor = BifocalProcessor(image_processor_of_size(32), train_wordpiece(TEXTS * 10, 300, 512))
    model = export_model(BifocalModel(config), folder / "model", processor)
    index = SearchIndex.create(folder / "index", str(model), weights_hash(model), options.dimensions)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((128, 128)).save(buffer, "PNG")
    small = thumbnail(Image.open(buffer))
    for start in range(0, options.items, 1024):
        count = min(1024, options.items - start)
        vectors = normalize(generator.standard_normal((count, options.dimensions))).astype(np.float32)
        rows = []
        for number, vector in enumerate(vectors, start):
            is_image = number % 2 == 0
            name = f"folder/{number}.jpg" if is_image else f"texts.jsonl:{number}"
            words = f"{TEXTS[number % len(TEXTS)]} {number}"
            rows.append({
                "key": hashlib.blake2b(name.encode(), digest_size=16).hexdigest(),
                "kind": "image" if is_image else "text", "text": "" if is_image else words,
                "image": small if is_image else None,
                "occurrences": [Occurrence(-1, name, words if is_image else "")], "embedding": vector,
            })  # fmt: skip
        index.table.append(rows)
    return index


def measure(site: Path, rounds: int) -> tuple[list[float], list[tuple[float, float, float]]]:
    """Return the seconds of each start, and the milliseconds of each search: vector, ranking, all of it."""
    from playwright.sync_api import sync_playwright

    handler = functools.partial(QuietHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    loads, searches = [], []
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        for _ in range(rounds):
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            loads.append(page.evaluate("client.ready.then(() => performance.now() / 1000)"))
            page.evaluate(SEARCH, TEXTS[0])  # the first one also warms the processor's code up
            searches += [page.evaluate(SEARCH, f"a photo of {text} today") for text in TEXTS]
            browser.close()
    server.shutdown()
    return loads, searches


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    main()
