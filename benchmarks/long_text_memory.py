"""Memory of encoding one text of 8,192 tokens at base size on the CPU, above the weights.

Prints one JSON line: the peak with the ALiBi bias made block by block, the peak with the whole bias (heads x length x
length) as a plain implementation makes it, and their ratio. Linux only: the peak is read from /proc.

    python benchmarks/long_text_memory.py [--tokens 8192] [--layers 12]
"""

import argparse
import json
import subprocess
import sys
import time

from process_memory import memory, restart_peak

MIB = 2**20


def peak_above_weights(tokens: int, layers: int, whole: bool) -> dict[str, float]:
    """Bytes that one forward pass adds at its peak to what the process held before it, and its seconds."""
    import torch

    from bifocal.modeling import BifocalTextConfig, BifocalTextModel, alibi_bifocal

    if whole:
        alibi_bifocal._LARGEST_WHOLE = 2**62
    torch.manual_seed(0)
    tower = BifocalTextModel(BifocalTextConfig(num_hidden_layers=layers)).eval()
    ids = torch.randint(1000, 30000, (1, tokens))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        tower(ids[:, :64], mask[:, :64])  # whatever the first pass sets up once
        before = memory("VmRSS")
        restart_peak()
        started = time.monotonic()
        finite = bool(torch.isfinite(tower(ids, mask).pooler_output).all())
    if not finite:
        raise ArithmeticError("The embedding is not finite.")
    return {"bytes": memory("VmHWM") - before, "seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--one", choices=["blocks", "whole"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(peak_above_weights(given.tokens, given.layers, given.one == "whole")))
        return
    measured = {}
    for way in ("blocks", "whole"):  # a process each, so that neither inherits the other's memory
        done = subprocess.run(
            [sys.executable, __file__, "--one", way, "--tokens", str(given.tokens), "--layers", str(given.layers)],
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        measured[way] = json.loads(done.stdout.splitlines()[-1])
    print(
        json.dumps(
            {
                "benchmark": "long_text_memory",
                "tokens": given.tokens,
                "layers": given.layers,
                "blocks_mib": round(measured["blocks"]["bytes"] / MIB),
                "whole_mib": round(measured["whole"]["bytes"] / MIB),
                "memory_ratio": round(measured["blocks"]["bytes"] / measured["whole"]["bytes"], 3),
                "time_ratio": round(measured["blocks"]["seconds"] / measured["whole"]["seconds"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
