"""Memory of encoding one text of 8,192 tokens at base size on the CPU, above the weights.

Run: python benchmarks/long_text_memory.py [--tokens 8192] [--layers 12]

Prints one JSON line: the peak with the ALiBi bias computed in blocks, the peak with the whole bias (heads x length x
length), and their ratio. Linux only: the peak is read from /proc.
"""

import argparse
import json
import subprocess
import sys
import time

from process_memory import memory, restart_peak

MIB = 2**20


def peak_above_weights(tokens: int, layers: int, whole: bool) -> dict[str, float]:
    """Return the bytes that a forward pass adds at its peak to those of the process, and its seconds."""
    import torch

    from bifocal.modeling import BifocalTextConfig, BifocalTextModel, alibi_bifocal

    if whole:
        alibi_bifocal._LARGEST_WHOLE = 2**62
    torch.manual_seed(0)
    tower = BifocalTextModel(BifocalTextConfig(num_hidden_layers=layers)).eval()
    ids = torch.randint(1000, 30000, (1, tokens))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        tower(ids[:, :64], mask[:, :64])  # one-time set-up
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
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak_above_weights(options.tokens, options.layers, options.one == "whole")))
        return
    measured = {}
    for way in ("blocks", "whole"):  # separate processes, so that neither inherits the other's memory
        process = subprocess.run(
            [sys.executable, __file__, "--one", way, "--tokens", str(options.tokens), "--layers", str(options.layers)],
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        measured[way] = json.loads(process.stdout.splitlines()[-1])
    print(
        json.dumps(
            {
                "benchmark": "long_text_memory",
                "tokens": options.tokens,
                "layers": options.layers,
                "blocks_mib": round(measured["blocks"]["bytes"] / MIB),
                "whole_mib": round(measured["whole"]["bytes"] / MIB),
                "memory_ratio": round(measured["blocks"]["bytes"] / measured["whole"]["bytes"], 3),
                "time_ratio": round(measured["blocks"]["seconds"] / measured["whole"]["seconds"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
