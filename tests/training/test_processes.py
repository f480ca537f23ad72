"""Two real processes give what one gives with a batch of twice the size."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from bifocal.training.towers import tower_of
from tests.processes import run_ranks
from tests.training import run_in_processes, run_sharded, run_stages


@pytest.fixture(scope="module")
def two(processor, tmp_path_factory) -> tuple[Path, list[CompletedProcess]]:
    """What two processes do, in one start for all tests; one process runs here."""
    folder = tmp_path_factory.mktemp("processes")
    processor.save_pretrained(folder / "processor")
    ranks = run_ranks(2, run_stages.__file__, folder)
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(rank.stderr[-3000:] for rank in ranks)
    return folder, ranks


def assert_close(two: dict[str, torch.Tensor], one: dict[str, torch.Tensor], case: str) -> None:
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{case}, {n}: {m}")


@pytest.mark.parametrize("case", run_in_processes.CASES)
def test_two_processes_equal_one(case, two):
    folder, _ = two
    run_in_processes.train(folder, case, 1)
    one, both = (torch.load(folder / f"{case}-{processes}.pt") for processes in (1, 2))
    assert len(one["losses"]) == 20
    torch.testing.assert_close(both["losses"], one["losses"], atol=1e-5, rtol=1e-5)
    assert both["eval"] == pytest.approx(one["eval"], abs=1e-5)
    assert len(one["gradients"]) > 30
    for part in ("gradients", "weights"):
        assert_close(both[part], one[part], part)


def test_stages_that_leave_parameters_unused(processor, two, tmp_path):
    """Texts alone, fixed temperatures, adapters, with checkpointed activations; averages; batches that alternate.

    Messages are given once.
    """
    folder, ranks = two
    stdout, stderr = ("".join(getattr(rank, name) for rank in ranks) for name in ("stdout", "stderr"))
    both = torch.load(folder / "stages.pt")
    assert both.pop("rows") == pytest.approx(4 * 2 * (4 + 4), rel=0.02), "of both tasks, batches and processes"
    for message in ("The model came in bfloat16", "auto_find_chunk_size embeds"):
        assert stderr.count(message) == 1, message
    assert stdout.count("train_runtime") == len(both) + len(run_in_processes.CASES)
    for rank in ranks:  # where batches alternate, it is needed, although the first batch reaches everything
        assert "find_unused_parameters=True" not in rank.stderr.partition(f"{run_stages.ALTERNATING}\n")[0]
    for name, weights in both.items():
        assert_close(weights, run_stages.run(name, tmp_path, 4, processor).model.state_dict(), name)


def test_sharded_weights_give_the_same_gradients(two):
    """FSDP 2 by torch itself: accelerate shards on accelerators only."""
    folder, _ = two
    run_sharded.steps(folder)
    one, both = (torch.load(folder / f"sharded-{processes}.pt") for processes in (1, 2))
    for step, (ours, theirs) in enumerate(zip(both, one, strict=True)):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        assert_close(ours["gradients"], theirs["gradients"], f"gradients of step {step}")
    assert {tower_of(name) for name in one[2]["gradients"]} == {"text"}, "alternating: texts reach nothing else"
