"""Gradients of cached steps, a joint one and two that alternate, of a model sharded by FSDP 2 over CPU processes.

Accelerate itself shards on GPUs only.

Called in each process, see `run_stages`.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.training.collator import MultiTaskCollator
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.engine.gradient_cache import cached_step, into_chunks
from bifocal.training.engine.joint_forward import joint_forward
from bifocal.training.joint_batches import JointBatchDataset
from bifocal.training.losses.multi_task_loss import MultiTaskLoss
from tests.conftest import small_config
from tests.training.run_in_processes import tasks


def steps(out: Path) -> None:
    processor = BifocalProcessor.from_pretrained(out / "processor")
    torch.manual_seed(0)
    model = BifocalModel(small_config())
    world = ProcessGroupInfo.current()
    if world.size > 1:
        mesh = init_device_mesh("cpu", (world.size,))
        for layer in [*model.text_model.layers, *model.vision_model.layers]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    parts = tasks(8 // world.size, "text-triplet")
    collate = MultiTaskCollator(processor, 32, 0, rank=world.rank)
    collate.bucketed = False
    items = [JointBatchDataset(parts, 1, 0, world)[0]]
    items += [JointBatchDataset(parts, 2, 0, world, alternate=True)[step] for step in range(2)]
    objective = MultiTaskLoss({task.name: task for task in parts}, world)

    @contextmanager
    def no_sync():
        if world.size > 1:
            model.set_requires_gradient_sync(False)
        yield
        if world.size > 1:
            model.set_requires_gradient_sync(True)

    results = []
    for item in items:
        inputs = collate([item])
        model.zero_grad()
        with joint_forward(model):
            loss = cached_step(
                into_chunks(inputs["texts"], inputs["images"], 6, 2, True),
                lambda texts, images: model(step_texts=texts, step_images=images),
                lambda embedded, batch=inputs: objective(embedded, batch)[0],
                lambda scalar: scalar.backward(),
                no_sync,
            )
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        whole = {n: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for n, grad in gradients.items()}
        results.append({"loss": world.mean([loss.item()], torch.device("cpu"))[0], "gradients": whole})
    if world.rank == 0:
        torch.save(results, out / f"sharded-{world.size}.pt")
