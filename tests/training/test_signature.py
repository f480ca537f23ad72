"""A run is resumed with the rows that follow, or refused with what changed."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import Subset

from bifocal.errors import TrainingError
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.joint_batches import JointBatchDataset, Schedule
from bifocal.training.signature import content_digest
from bifocal.training.tasks import Task
from tests.conftest import TEXTS
from tests.modeling.test_images import photo
from tests.training.test_trainer import trainer

ROWS = [f"{text} {n}" for n in range(4) for text in TEXTS]


def pairs(name: str = "a", queries=ROWS, **options) -> Task:
    data = Dataset.from_dict({"query": list(queries), "positive": [f"{query} again" for query in queries]})
    data = data.to_iterable_dataset(num_shards=2) if options.pop("stream", False) else data
    return Task(name, "text-pair", data, **{"batch_size": 4, **options})


@pytest.fixture(scope="module")
def made(processor, tmp_path_factory):
    """Checkpoints of a run of two data sets, and of a stream."""
    folder = tmp_path_factory.mktemp("made")
    for name, tasks in (("map", [pairs(), pairs("b")]), ("stream", [pairs(stream=True)])):
        trainer(folder / name, processor, steps=2, tasks=tasks, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.mark.parametrize(
    ("options", "tasks", "message"),
    [
        ({"seed": 7}, None, "seed was 42 and is now 7"),
        ({"data_seed": 7}, None, "seed was 42 and is now 7"),
        ({"gradient_accumulation_steps": 2}, None, "gradient_accumulation_steps was 1 and is now 2"),
        ({}, [pairs(batch_size=5), pairs("b")], "batch_size of task 'a' was 4 and is now 5"),
        ({}, [pairs(), pairs("b", sampling_weight=2.0)], "sampling_weight of task 'b' was 1.0 and is now 2.0"),
        ({}, [pairs(), pairs("b", ROWS[:-1])], "num_rows of task 'b' was 20 and is now 19"),
        ({}, [pairs(), pairs("b", ROWS[::-1])], "the data set of task 'b' has other rows than before"),
        ({}, [pairs()], "the tasks were a, b and are now a"),
        ({}, [pairs(), pairs("b"), pairs("c")], "the tasks were a, b and are now a, b, c"),
        ({}, [pairs(), pairs("z")], "the tasks were a, b and are now a, z"),
        ({}, [pairs("b"), pairs("a")], "the tasks were a, b and are now b, a"),
    ],
)
def test_another_order_of_rows_is_refused(made, processor, tmp_path, options, tasks, message):
    it = trainer(tmp_path, processor, steps=4, tasks=tasks or [pairs(), pairs("b")], **options)
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be resumed.*twice") as error:
        it.train(resume_from_checkpoint=str(made / "map" / "checkpoint-2"))
    assert message in str(error.value)
    assert it.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "task", "message"),
    [
        ({}, {"shuffle_buffer_size": 3}, "shuffle_buffer_size of task 'a' was 1024 and is now 3"),
        ({}, {"num_rows": 20}, "num_rows of task 'a' was None and is now 20"),
        ({"dataloader_num_workers": 1}, {}, "dataloader_num_workers was 0 and is now 1"),
    ],
)
def test_streams_are_read_the_same_way(made, processor, tmp_path, options, task, message):
    it = trainer(tmp_path, processor, steps=4, tasks=[pairs(stream=True, **task)], **options)
    with pytest.raises(ValueError, match=message):
        it.train(resume_from_checkpoint=str(made / "stream" / "checkpoint-2"))


def test_another_number_of_processes_is_refused(made, processor, tmp_path):
    for rank in (0, 1):
        it = trainer(tmp_path, processor, steps=4, tasks=[pairs(), pairs("b")])
        it.world = ProcessGroupInfo(rank, 2)
        with pytest.raises(ValueError, match="processes was 1 and is now 2"):
            it.restore_state(str(made / "map" / "checkpoint-2"))


def test_what_does_not_move_rows_may_change(made, processor, tmp_path):
    seen = []
    tasks = [replace(pairs(), loss_weight=2.0, temperature=0.1), pairs("b")]
    options = dict(logging_steps=1, learning_rate=1e-4, max_grad_norm=0.5, dataloader_num_workers=1)
    it = trainer(tmp_path, processor, steps=6, tasks=tasks, **options)
    add = it.training_metrics.add
    it.training_metrics.add = lambda loss, results, inputs: (seen.append(inputs["step"]), add(loss, results, inputs))
    it.train(resume_from_checkpoint=str(made / "map" / "checkpoint-2"))
    assert seen == [2, 3, 4, 5]


def test_more_steps_draw_the_same_first_ones():
    tasks = [pairs(sampling_weight=0.3), pairs("b"), pairs("c", sampling_weight=2.0)]
    short, long = (Schedule(tasks, steps, 3) for steps in (50, 5000))
    for sort in short.numbers:
        assert np.array_equal(short.numbers[sort], long.numbers[sort][:50])
        assert np.array_equal(short.uses[sort], long.uses[sort][:50])
    assert [JointBatchDataset(tasks, 50, 3)[n]["tasks"][0][1] for n in range(50)] == [
        JointBatchDataset(tasks, 5000, 3)[n]["tasks"][0][1] for n in range(50)
    ]


def test_weights_alone_are_not_a_checkpoint(processor, tmp_path):
    options = dict(tasks=[pairs()], save_strategy="steps", save_steps=2, save_only_model=True)
    trainer(tmp_path, processor, steps=2, **options).train()
    with pytest.raises(ValueError, match=r"has no bifocal_state_0.json.*start a new run"):
        trainer(tmp_path, processor, steps=4, **options).train(resume_from_checkpoint=True)


def test_a_data_set_is_known_by_its_texts(tmp_path):
    before = content_digest(pairs())
    assert content_digest(pairs()) == before
    stored = pairs().dataset
    stored.save_to_disk(tmp_path / "moved")
    again = Dataset.load_from_disk(tmp_path / "moved").with_transform(
        lambda rows: {**rows, "query": [str(torch.rand(1).item()) for _ in rows["query"]]}
    )
    assert content_digest(Task("a", "text-pair", again, 4)) == before, "moved, and with a transform that draws"
    assert content_digest(pairs(queries=[*ROWS[:-1], "other"])) != before

    def digest(rows):
        return content_digest(SimpleNamespace(streams=False, dataset=rows))

    rows = [{"query": row, "image": photo(8, 8)} for row in ROWS]
    assert digest(rows) == digest([{**row, "image": photo(9, 9)} for row in rows]) != digest(rows[::-1])
    assert digest(Subset(rows, range(3))) is None, "what a torch Dataset gives may be drawn at each look"


def test_images_that_were_moved_are_the_same_rows():
    def digests(folder):
        rows = [{"caption": row, "image": f"{folder}/{n}.png"} for n, row in enumerate(ROWS)]
        return [content_digest(Task("v", "image-text", data, 4)) for data in (rows, Dataset.from_list(rows))]

    assert digests("old") == digests("/new/place")


def edited(folder, to, **changes):
    """A copy of a checkpoint with changes in its state; None removes a key."""
    shutil.copytree(folder, to)
    path = to / "bifocal_state_0.json"
    state = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in state.items() if value is not None}))
    return str(to)


def test_a_checkpoint_of_an_earlier_version_is_refused(made, processor, tmp_path):
    old = edited(made / "map" / "checkpoint-2", tmp_path / "old", signature=None)
    it = trainer(tmp_path, processor, steps=4, tasks=[pairs(), pairs("b")])
    with pytest.raises(TrainingError, match=r"old was written by an earlier version .* start a new run"):
        it.train(resume_from_checkpoint=old)


def test_a_process_does_not_take_the_streams_of_another(made, processor, tmp_path):
    folder = made / "stream" / "checkpoint-2"
    signature = json.loads((folder / "bifocal_state_0.json").read_text())["signature"]
    two = edited(folder, tmp_path / "two", signature={**signature, "processes": 2})
    for rank in (0, 1):
        it = trainer(tmp_path, processor, steps=4, tasks=[pairs(stream=True)])
        it.world = ProcessGroupInfo(rank, 2)
        if rank == 0:
            it.restore_state(two)
            continue
        with pytest.raises(TrainingError, match=r"has no bifocal_state_1.json.*where process 1 stood in its streams"):
            it.restore_state(two)


def test_rows_of_a_step_that_failed_are_seen_again(processor, tmp_path):
    """The checkpoint from before a loss that is not finite continues with the rows of that loss."""
    batches = {}

    def run(name, spoilt=None, resume=None):
        it = trainer(
            tmp_path / name, processor, steps=3, tasks=[pairs(stream=True)], gradient_accumulation_steps=2
        )  # fmt: skip
        seen, check = batches.setdefault(name, []), it.require_finite

        def require_finite(loss, results, inputs):
            seen.append(inputs["tasks"]["a"].rows)
            check(loss * float("nan") if len(seen) == spoilt else loss, results, inputs)

        it.require_finite = require_finite
        it.train(resume_from_checkpoint=resume)

    run("whole")
    with pytest.raises(FloatingPointError, match=r"at step 2 .*checkpoint-1 has the weights from before it"):
        run("cut", spoilt=4)  # the second batch of the second step
    run("resumed", resume=str(tmp_path / "cut" / "checkpoint-1"))
    assert batches["cut"] == batches["whole"][:4]
    assert batches["resumed"] == batches["whole"][2:]


@pytest.mark.parametrize("main_has_it", [False, True])
def test_all_processes_save_together_or_none(main_has_it, processor, tmp_path):
    """Saving is a collective; a process may see the main one's folder earlier or later than that one does."""
    said = []

    class Second(ProcessGroupInfo):
        def mean(self, values, device):
            return [1.0]

        def smallest(self, values, device):
            said.append(values)
            return [min(*values, int(main_has_it))]

    it = trainer(tmp_path, processor, tasks=[pairs()])
    it.world, it.state.global_step = Second(1, 2), 1
    saves = []
    it._save_checkpoint = lambda *given, **options: saves.append(given)
    if not main_has_it:
        (tmp_path / "checkpoint-1").mkdir()
    results = {"a": SimpleNamespace(loss=torch.tensor(1.0))}
    with pytest.raises(FloatingPointError):
        it.require_finite(torch.tensor(1.0), results, {"tasks": {"a": SimpleNamespace(rows=[0])}})
    assert len(saves) == (not main_has_it)
    assert said == [[1]]
