"""Start-up of the `bifocal` command: its help, its version, and what is wrong with its arguments.

Run: python benchmarks/startup_commands.py [--rounds 5]

Prints one JSON line: seconds of new processes, in turn, from the start of the interpreter to its end, and in `cpu` the
seconds of processor time that each needed. `python` alone is the floor, `import torch` is what a command would
need at least if it imported its model first. Files are in the page cache.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPE = """
name: mine
tasks:
- {name: pairs, kind: text-pair, batch_size: 2, data: {path: pairs.jsonl}}
training: {max_steps: 1}
"""
FLOORS = {"python": "pass", "import torch": "import torch", "import bifocal": "import bifocal"}
# Commands by their exit code; those with 1 and 2 have something wrong with their arguments.
COMMANDS = {
    0: ("--help", "version", "--version", "train --help", "index --help", "recipes list"),
    1: (
        "train nope", "train bad.yaml", "train good.yaml training.learning_rat=1", "train good.yaml output_dir=notes",
        "mine pairs.jsonl out.parquet --model ./nope", "mine ./nope out.parquet --model Qwen/Qwen3-Embedding-0.6B",
        "evaluate ./nope", "evaluate notes", "evaluate BAAI/bge-m3 --suite nope", "convert ./nope out",
        "convert notes out", "export notes out", "push ./nope organisation/name",
        "index ./nope index --model openai/clip-vit-base-patch32",
        "index pairs.jsonl index --model ./nope", "index pairs.jsonl index --model notes", "search ./nope cat",
        "remove ./nope name", "serve ./nope", "data inspect ./nope", "data inspect pairs.jsonl nope=1",
        "data clean pairs.jsonl notes", "data caption ./nope out --model google/gemma-3-4b-it", "recipes show nope",
        "demo --out notes",
    ),
    2: ("nonsense", "train", "train good.yaml --nope", "search index cat --hits 0"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    cases = {name: (0, ["-c", code]) for name, code in FLOORS.items()}
    for code, commands in COMMANDS.items():
        cases |= {command: (code, ["-m", "bifocal", *shlex.split(command)]) for command in commands}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as scratch:
        folder = _fill(Path(scratch))
        for turn in range(rounds + 1):
            for name, (code, arguments) in cases.items():
                taken = _measure(folder, arguments, code)
                if turn:  # files are read from the disk in the first
                    seconds[name].append(taken[0])
                    cpu[name].append(taken[1])
    line: dict[str, Any] = {"benchmark": "startup_commands", "rounds": rounds}
    line["seconds"] = {name: spread(values) for name, values in seconds.items()}
    line["cpu"] = {name: spread(values) for name, values in cpu.items()}
    for title, codes in (("help and version", (0,)), ("wrong arguments", (1, 2))):
        commands = [command for code in codes for command in COMMANDS[code]]
        slowest = max(commands, key=lambda command: statistics.median(seconds[command]))
        line[f"slowest, {title}"] = {"command": slowest, "seconds": spread(seconds[slowest])}
    print(json.dumps(line))


def _fill(folder: Path) -> Path:
    """Put what the commands name into a folder."""
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("words\n", encoding="utf-8")
    (folder / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n', encoding="utf-8")
    (folder / "good.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "bad.yaml").write_text(f"{RECIPE}nme: 1\n", encoding="utf-8")
    return folder


def _measure(folder: Path, arguments: list[str], expected: int) -> tuple[float, float]:
    """Return the seconds and the seconds of processor time of one process, which must end with an exit code."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    taken, after = time.perf_counter() - started, os.times()
    if done.returncode != expected:
        raise SystemExit(f"'{' '.join(arguments)}' ended with {done.returncode}, not {expected}: {done.stderr[-500:]}")
    user, system = after.children_user - before.children_user, after.children_system - before.children_system
    return taken, user + system


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, lowest and highest value."""
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


if __name__ == "__main__":
    main()
