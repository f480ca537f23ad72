"""Start-up: importing, and loading a model of base size from a local folder, against transformers' CLIP of base size.

Run: python benchmarks/peers/startup.py [--rounds 5]

Prints one JSON line: seconds in new processes, in turn, from the start of the interpreter until the model is ready.
Ratios are ours over CLIP's, below 1 if ours is faster. Files are in the page cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import spread

CODE = {
    "ours, installed": "from bifocal import BifocalModel; BifocalModel.from_pretrained({ours!r})",
    "ours, by AutoModel": (
        "from transformers import AutoModel; AutoModel.from_pretrained({ours!r}, trust_remote_code=True)"
    ),
    "CLIP": "from transformers import CLIPModel; CLIPModel.from_pretrained({clip!r})",
    "CLIP, by AutoModel": "from transformers import AutoModel; AutoModel.from_pretrained({clip!r})",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = _save(Path(scratch))
        seconds: dict[str, list[float]] = {name: [] for name in CODE}
        for turn in range(options.rounds + 1):
            for name, code in CODE.items():
                started = time.perf_counter()
                # -I: without this folder and the user's settings on the path.
                subprocess.run([sys.executable, "-I", "-c", code.format(**folders)], check=True, capture_output=True)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    line: dict[str, Any] = {"benchmark": "peers/startup", "rounds": options.rounds}
    line |= {name: spread(values) for name, values in seconds.items()}
    for ours, clip in (("ours, installed", "CLIP"), ("ours, by AutoModel", "CLIP, by AutoModel")):
        line[f"{ours} over {clip}"] = spread([o / c for o, c in zip(seconds[ours], seconds[clip], strict=True)])
    print(json.dumps(line))


def _save(scratch: Path) -> dict[str, str]:
    """Save models of base size with zeros as weights, whose values make no difference to loading."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from bifocal.modeling import BifocalConfig, BifocalModel

    folders = {}
    for name, kind, config in (("ours", BifocalModel, BifocalConfig()), ("clip", CLIPModel, CLIPConfig())):
        with torch.device("meta"):
            model = kind(config)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.zero_()
        model.save_pretrained(scratch / name)
        folders[name] = str(scratch / name)
    return folders


if __name__ == "__main__":
    main()
