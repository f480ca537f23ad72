"""Memory of long texts at base size on the CPU, above the weights: encoding one, or a training step of a batch.

Run: python benchmarks/long_text_memory.py [--tokens 8192] [--layers 12]
     python benchmarks/long_text_memory.py --train [--tokens 2048] [--batch 8] [--layers 2] [--attention sdpa]

Prints one JSON line with peaks and ratios. Encoding: the tower as it is against the whole ALiBi bias (heads x length x
length). Training, forward and backward with rows of a quarter of the tokens to all of them: the tower as it is against
the whole bias (batch x heads x length x length) and against attention without any bias or padding ("none"), which gets
torch's fused attention. Each way runs in a process of its own. Linux only: the peak is read from /proc.
"""

import argparse
import json
import subprocess
import sys
import time

from process_memory import memory, restart_peak

MIB = 2**20


def peak_above_weights(way: str, train: bool, tokens: int, batch: int, layers: int, attention: str) -> dict[str, float]:
    """Return the bytes that a pass adds at its peak to those of the process, and its seconds."""
    import torch

    from bifocal.modeling import BifocalTextConfig, BifocalTextModel, alibi_bifocal, modeling_bifocal_text

    if way == "whole":
        alibi_bifocal._LARGEST_WHOLE = 2**62
    if way == "none":
        modeling_bifocal_text.AlibiBias = lambda *arguments: None
        modeling_bifocal_text.alibi_attention = _attention_without_bias
    torch.manual_seed(0)
    tower = BifocalTextModel(BifocalTextConfig(num_hidden_layers=layers)).train(train)
    tower.set_attn_implementation(attention)
    ids = torch.randint(1000, 30000, (batch, tokens))
    lengths = torch.linspace(tokens / 4 if train else tokens, tokens, batch).round() if batch > 1 else tokens
    mask = (torch.arange(tokens).expand_as(ids) < torch.as_tensor(lengths).reshape(-1, 1)).long()

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(train):
            pooled = tower(ids, mask).pooler_output
            if train:
                pooled.square().sum().backward()
        return pooled

    run(ids[:, :64], mask[:, :64])  # one-time set-up
    tower.zero_grad()
    before = memory("VmRSS")
    restart_peak()
    started, used = time.monotonic(), time.process_time()
    pooled = run(ids, mask)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - used
    if not torch.isfinite(pooled).all():
        raise ArithmeticError("The embedding is not finite.")
    return {"bytes": memory("VmHWM") - before, "seconds": seconds, "cpu_seconds": cpu_seconds}


def _attention_without_bias(function, implementation, module, query, key, value, *arguments, **options):  # type: ignore[no-untyped-def]
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(query, key, value).transpose(1, 2), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="a training step")
    parser.add_argument("--tokens", type=int, help="tokens of the longest text")
    parser.add_argument("--batch", type=int, help="texts per training step")
    parser.add_argument("--layers", type=int, help="layers of the tower")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="attention implementation")
    parser.add_argument("--one", choices=["blocks", "whole", "none"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens, batch, layers = (
        given if given is not None else default
        for given, default in zip(
            (options.tokens, options.batch, options.layers), (2048, 8, 2) if options.train else (8192, 1, 12),
            strict=True,
        )
    )  # fmt: skip
    if options.one:
        print(json.dumps(peak_above_weights(options.one, options.train, tokens, batch, layers, options.attention)))
        return
    measured = {}
    ways = ("blocks", "whole", "none") if options.train else ("blocks", "whole")
    for way in ways:  # separate processes, so that none inherits another's memory
        process = subprocess.run(
            [
                sys.executable, __file__, "--one", way, "--tokens", str(tokens), "--batch", str(batch),
                "--layers", str(layers), "--attention", options.attention, *(["--train"] if options.train else []),
            ],
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        measured[way] = json.loads(process.stdout.splitlines()[-1])
    result = {
        "benchmark": "long_text_memory", "pass": "training step" if options.train else "encoding", "tokens": tokens,
        "batch": batch, "layers": layers, "attention": options.attention,
    }  # fmt: skip
    result |= {f"{way}_mib": round(measured[way]["bytes"] / MIB) for way in ways}
    result |= _ratios(measured["blocks"], measured["whole"], "")
    if options.train:
        result |= _ratios(measured["blocks"], measured["none"], "_to_none")
        result |= {"whole_memory_ratio_to_none": round(measured["whole"]["bytes"] / measured["none"]["bytes"], 3)}
    print(json.dumps(result))


def _ratios(ours: dict[str, float], other: dict[str, float], suffix: str) -> dict[str, float]:
    names = {"bytes": "memory_ratio", "seconds": "time_ratio", "cpu_seconds": "cpu_time_ratio"}
    return {name + suffix: round(ours[field] / other[field], 3) for field, name in names.items()}


if __name__ == "__main__":
    main()
