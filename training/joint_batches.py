"""Joint or alternating batches: their rows are a function of the seed and the step, so that a run resumes exactly."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch.utils.data
from torch.utils.data import Dataset, IterableDataset

from bifocal.errors import TrainingError
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.streams import BlockReader
from bifocal.training.task_dataset import read_rows
from bifocal.training.tasks import Task

MODALITIES = ("image", "text")


class Schedule:
    """The task of each modality that a step draws, and how often it was drawn before.

    Args:
        tasks: the tasks of the stage.
        steps: number of batches.
        seed: seed of the draws.
        alternate: each batch holds one modality, images first, in turn: batch `step` is part `step % 2` of the joint
            batch `step // 2`. Tasks of one modality are not affected.

    Attributes:
        alternates: whether batches alternate: `alternate`, with tasks of both modalities.
        shares: by task, its share of the batches of its modality.

    Raises:
        TrainingError: if one of several tasks of one modality streams and has no `num_rows`.
    """

    def __init__(self, tasks: Sequence[Task], steps: int, seed: int, alternate: bool = False) -> None:
        self.steps = steps
        self.alternates = alternate and {task.modality for task in tasks} == set(MODALITIES)
        draws = -(-steps // 2) if self.alternates else steps
        self.numbers: dict[str, np.ndarray] = {}
        self.uses: dict[str, np.ndarray] = {}
        self.shares: dict[str, float] = {}
        for order, modality in enumerate(MODALITIES):
            members = [number for number, task in enumerate(tasks) if task.modality == modality]
            if not members:
                continue
            sizes = [tasks[number].size for number in members]
            if len(members) > 1 and None in sizes:
                name = tasks[members[sizes.index(None)]].name
                raise TrainingError(f"Task '{name}' streams with others of its modality; set num_rows of the task.")
            weights = np.array(
                [(size or 1) * tasks[number].sampling_weight for number, size in zip(members, sizes, strict=True)]
            )
            if weights.min() < 0 or not weights.sum() > 0:
                raise TrainingError("One sampling_weight of each modality must be above 0, and none may be negative.")
            share = weights / weights.sum()
            self.shares |= {tasks[number].name: float(part) for number, part in zip(members, share, strict=True)}
            drawn = np.array(members)[np.random.default_rng([seed, order]).choice(len(members), draws, p=share)]
            self.numbers[modality] = drawn
            uses = np.zeros(draws, dtype=np.int64)
            for number in members:
                mine = drawn == number
                uses[mine] = np.arange(mine.sum())
            self.uses[modality] = uses

    def at(self, step: int) -> list[tuple[int, int]]:
        """Return (number of a task, how often it was drawn before this step), images first."""
        draw, part = divmod(step, 2) if self.alternates else (step, 0)
        drawn = [(int(self.numbers[modality][draw]), int(self.uses[modality][draw])) for modality in self.numbers]
        return drawn[part : part + 1] if self.alternates else drawn

    def num_batches(self, modality: str) -> int:
        """Return how many batches hold a modality that the tasks have."""
        if not self.alternates:
            return self.steps
        return self.steps // 2 if modality == "text" else -(-self.steps // 2)


class Batches:
    """The base of map-style and streamed batches.

    Each map-style task is passed through in a new random order per epoch; rows that do not fill a batch of all
    processes at the end of an epoch are left for the next one.

    Args:
        tasks: the tasks of the stage.
        steps: number of batches, the length of the data set.
        seed: seed of all random orders.
        world: a process takes its part of the joint batch.
        alternate: batches of one modality, in turn (see `Schedule`).

    Attributes:
        decode: reads the images of streams, so that rows with a broken one are skipped before a batch is made.
    """

    decode: Callable[[Any], Any] | None = None

    def __init__(
        self,
        tasks: Sequence[Task],
        steps: int,
        seed: int,
        world: ProcessGroupInfo = ProcessGroupInfo(),
        alternate: bool = False,
    ) -> None:
        self.tasks = tasks
        self.steps = steps
        self.seed = seed
        self.world = world
        self.schedule = Schedule(tasks, steps, seed, alternate)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        for task in tasks:
            if not task.streams and len(task.dataset) < task.batch_size * world.size:
                batch = f"the {task.batch_size * world.size} of its batches in {world.size} processes"
                raise TrainingError(
                    f"The data set of task '{task.name}' has {len(task.dataset)} rows, fewer than "
                    f"{batch if world.size > 1 else f'its batch of {task.batch_size}'}; give a smaller batch_size or "
                    "more rows."
                )

    def rows(self, number: int, use: int) -> np.ndarray:
        """Return the row numbers of this process when task `number` is drawn for the `use`-th time."""
        task = self.tasks[number]
        joint = task.batch_size * self.world.size
        epoch, batch = divmod(use, len(task.dataset) // joint)
        if self._orders.get(number, (-1, None))[0] != epoch:
            order = np.random.default_rng([self.seed, number, epoch]).permutation(len(task.dataset))
            self._orders[number] = (epoch, order)
        start = batch * joint + self.world.rank * task.batch_size
        return self._orders[number][1][start : start + task.batch_size]

    def drawn(self, step: int) -> list[tuple[Task, list[Any], dict[str, list[Any]]]]:
        """Return (task, row numbers, columns of the rows) of the map-style tasks of a step."""
        parts = []
        for number, use in self.schedule.at(step):
            task = self.tasks[number]
            if not task.streams:
                rows = self.rows(number, use).tolist()
                parts.append((task, rows, read_rows(task.dataset, rows)))
        return parts


class JointBatchDataset(Batches, Dataset):
    """A map-style data set whose item `step` is one batch of each modality of task, or of one of them in turn."""

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return `{"step": step, "tasks": [(task, row numbers, columns of the rows), ...]}`."""
        return {"step": step, "tasks": self.drawn(step)}


class JointBatchStream(Batches, IterableDataset):
    """A stream of the same items in order, for stages in which a task streams.

    Worker w of W makes the steps w, w + W, ...; each reads its own part of every stream that it needs. Every item
    says where its worker's readers stand after it, so that a checkpoint knows exactly what was used and what was only
    prefetched.

    Args:
        positions: where the readers of each worker stood at a checkpoint, and `start`, the first step after it. Steps
            before `start` come as None, at no cost.
    """

    start = 0
    positions: Mapping[int, Mapping[str, Any]] = MappingProxyType({})

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        modalities: Sequence[str] = MODALITIES
        share, shares = worker, workers  # of a stream: which one this worker reads, of how many in this process
        if self.schedule.alternates and workers % 2 == 0:
            # All batches of a worker are of one modality; its streams are shared out to half of the workers.
            modalities, share, shares = [MODALITIES[worker % 2]], worker // 2, workers // 2
        readers = {
            number: BlockReader(
                task, self.seed + number, self.world.rank * shares + share, self.world.size * shares, self.decode
            )
            for number, task in enumerate(self.tasks)
            if task.streams and task.modality in modalities
        }
        for number, reader in readers.items():
            state = self.positions.get(worker, {}).get(self.tasks[number].name)
            if state is not None:
                reader.load_state(state)
        for step in range(worker, self.steps, workers):
            if step < self.start:
                yield None
                continue
            parts = self.drawn(step)
            for number, _ in self.schedule.at(step):
                if number in readers:
                    rows, columns = readers[number].take(self.tasks[number].batch_size)
                    parts.append((self.tasks[number], rows, columns))
            states = {self.tasks[number].name: reader.state() for number, reader in readers.items()}
            skips = {self.tasks[number].name: reader.report() for number, reader in readers.items()}
            yield {"step": step, "tasks": parts, "position": (worker, states), "skips": skips}
