"""One process of a run that streams tar shards with two data workers; writes the names of the rows it saw.

torchrun --nproc-per-node=2 stream_in_processes.py SHARDS OUT STEPS
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from bifocal.data.loading import load_source
from bifocal.data.source import Source
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.joint_batches import JointBatchStream
from bifocal.training.tasks import Task


def main() -> None:
    pattern, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.distributed.init_process_group("gloo")
    world = ProcessGroupInfo.current()
    stream = load_source(Source(path=pattern, streaming=True), "image-text")
    batches = JointBatchStream([Task("shards", "image-text", stream, 5)], steps, seed=0, world=world)
    loader = DataLoader(batches, batch_size=1, collate_fn=lambda items: items[0], num_workers=2)
    names = [name for item in loader for _, rows, _ in item["tasks"] for name in rows]
    (out / f"{world.rank}.json").write_text(json.dumps(names))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
