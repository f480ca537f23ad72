"""`bifocal embed` in one process, in two, and on Ray on this machine, in rows per second.

Run: python benchmarks/embed_parallel.py [--rows 12000] [--files 8] [--workers 2] [--rounds 2] [--width 384]
    [--layers 6] [--only one workers ray]

Prints one JSON line: for each way the seconds until a run over one text per process ends ("start", mostly imports and
loading the model), the seconds of a whole run ("total"), the rows per second of what lies between, and its ratio to one
process; and whether the vectors are those of one process to 1e-5. The ways take turns, and the best round of each
counts. All cores are shared by the processes of a way, so that two processes on two cores have one thread each, and one
process has two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("one", "workers", "ray")
WORDS = ("a dog", "two boats", "an old man", "some kites", "a red house", "three children", "a market", "on a beach")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 12000), ("files", 8), ("workers", 2), ("rounds", 2), ("width", 384), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", options.width, options.layers)
        write_texts(folder / "long", options.files, options.rows // options.files)
        write_texts(folder / "short", options.workers, 1)
        arguments = {
            "one": [],
            "workers": ["--workers", str(options.workers)],
            "ray": ["--ray", "local", "--concurrency", str(options.workers)],
        }
        seconds: dict[str, dict[str, list[float]]] = {way: {"short": [], "long": []} for way in options.only}
        for number in range(options.rounds):
            for way in options.only:
                for source in ("short", "long"):
                    out = folder / f"{way}-{source}-{number}"
                    seconds[way][source].append(timed_run(folder, source, out, arguments[way]))
        rows = options.files * (options.rows // options.files) - options.workers
        result: dict[str, dict[str, float | bool]] = {}
        for way, times in seconds.items():
            start, total = min(times["short"]), min(times["long"])
            if total < 1.5 * start:
                sys.exit(
                    f"'{way}' starts in {start:.1f} s and ends in {total:.1f} s, too few to tell. Give more --rows."
                )
            result[way] = {"start": start, "total": total, "rows_per_second": rows / (total - start)}
        first = options.only[0]
        for way, numbers in result.items():
            numbers["speed_ratio"] = float(numbers["rows_per_second"]) / float(result[first]["rows_per_second"])
            numbers["same_vectors"] = same(folder / f"{first}-long-0", folder / f"{way}-long-0")
        shown = {way: {key: round_off(value) for key, value in numbers.items()} for way, numbers in result.items()}
        print(json.dumps({**vars(options), "cores": len(os.sched_getaffinity(0)), "against": first, **shown}))


def round_off(value: float | bool) -> float | bool:
    return value if isinstance(value, bool) else round(value, 2)


def write_model(path: Path, width: int, layers: int) -> None:
    import torch

    from bifocal.hub.export import export_model
    from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
    from bifocal.modeling.processing_bifocal import image_processor_of_size
    from bifocal.training.tokenizer import train_wordpiece

    torch.manual_seed(0)
    tower = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64))
    text = {**tower, "vocab_size": 320, "intermediate_size": 4 * width, "max_position_embeddings": 512}
    vision = {**tower, "num_hidden_layers": 1, "intermediate_size": 2 * width, "image_size": 32, "patch_size": 16}
    model = BifocalModel(BifocalConfig(text_config=text, vision_config=vision, projection_dim=width))
    tokenizer = train_wordpiece([" ".join(WORDS)], 300, 512)
    export_model(model, path, BifocalProcessor(image_processor_of_size(32), tokenizer))


def write_texts(folder: Path, files: int, rows: int) -> None:
    folder.mkdir()
    for file in range(files):
        texts = [" ".join(WORDS[(file + n * step) % 8] for step in range(1, 9)) + f" {file} {n}" for n in range(rows)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{file:03}.jsonl").write_text(lines, encoding="utf-8")


def timed_run(folder: Path, source: str, out: Path, arguments: list[str]) -> float:
    command = [sys.executable, "-m", "bifocal", "embed", f"{folder / source}/*.jsonl", str(out)]
    command += ["--model", str(folder / "model"), "--rows-per-part", "500", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    elapsed = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return elapsed


def same(one: Path, other: Path) -> bool:
    """Return whether two tables have the same rows, and vectors to 1e-5."""
    import numpy as np
    import pyarrow.parquet as pq

    tables = [pq.read_table(path).sort_by("key") for path in (one, other)]
    vectors = [np.array(table["vector"].to_pylist()) for table in tables]
    equal = all(tables[0][column].equals(tables[1][column]) for column in ("key", "name", "text"))
    return equal and bool(np.abs(vectors[0] - vectors[1]).max() < 1e-5)


if __name__ == "__main__":
    main()
