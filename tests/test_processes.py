"""The processes of the tests: they do what `python` does, and know nothing of each other."""

import json
import signal
import time

import pytest

from tests.processes import HEAVY, Process, run, run_ranks


def value(code: str, **environment: str):
    """What an expression is in a new process, after `import os, sys`."""
    done = run("-c", f"import json, os, sys\nprint(json.dumps({code}))", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_what_python_is(tmp_path):
    (tmp_path / "one.py").write_text("import sys; print(__name__, sys.argv); sys.exit(3)")
    done = run("one.py", "a", "b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "__main__ ['one.py', 'a', 'b']\n")
    assert run("-m", "one", "a", cwd=tmp_path).stdout.startswith("__main__ ['")
    assert run("-c", "import sys; print(sys.argv)", "x").stdout == "['-c', 'x']\n"
    failed = run("-c", "import os; os.write(2, b'first '); print('out'); raise ValueError('wrong')")
    assert (failed.returncode, failed.stdout) == (1, "out\n")
    assert failed.stderr.startswith("first ")
    assert failed.stderr.strip().endswith("ValueError: wrong")
    ended = run("-c", "import atexit; atexit.register(print, 'last'); print('first')")
    assert ended.stdout == "first\nlast\n"


def test_heavy_imports_are_done_and_ours_are_not():
    assert value(f"[name in sys.modules for name in {HEAVY}]") == [True] * len(HEAVY)
    assert value("[name for name in sys.modules if name.partition('.')[0] == 'bifocal']") == []


def test_nothing_is_inherited(monkeypatch):
    monkeypatch.setenv("FROM_HERE", "1")
    assert value("[os.environ.get('FROM_HERE'), os.environ['ONLY_THERE']]", ONLY_THERE="2") == ["1", "2"]
    drawn = [value("__import__('numpy').random.rand()") for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert value("__import__('multiprocessing').get_start_method()") != "forkserver"
    assert value("len(__import__('threading').enumerate())") == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_in_as_many_threads_as_asked(threads):
    code = """
import os, torch
a = torch.ones(1500, 1500)
assert (a @ a == 1500).all()
assert torch.nn.functional.softmax(a, -1).sum() > 1
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")))
"""
    done = run("-c", code, OMP_NUM_THREADS=str(threads))
    assert done.stdout.split()[0] == str(threads), done.stderr


def test_killed(tmp_path):
    process = Process("-c", "import pathlib, time; pathlib.Path('there').touch(); time.sleep(60)", cwd=tmp_path)
    while not (tmp_path / "there").exists():
        assert process.running
        time.sleep(0.01)
    process.kill()
    assert process.finish().returncode == -signal.SIGKILL
    itself = run("-c", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert itself.returncode == -signal.SIGKILL
    with pytest.raises(AssertionError, match="took more than"):
        run("-c", "import time; time.sleep(60)", timeout=0.2)


def test_ranks_find_each_other():
    code = """
import os, torch
torch.distributed.init_process_group("gloo")
total = torch.tensor([torch.distributed.get_rank() + 1.0])
torch.distributed.all_reduce(total)
print(total.item(), os.environ["LOCAL_RANK"])
torch.distributed.destroy_process_group()
"""
    done = run_ranks(2, "-c", code)
    assert [rank.stdout for rank in done] == ["3.0 0\n", "3.0 1\n"], done[0].stderr
    start = time.monotonic()
    broken = run_ranks(2, "-c", f"import os; assert os.environ['RANK'] == '0'\n{code}")
    assert broken[1].returncode == 1
    assert time.monotonic() - start < 60, "one that fails ends the others"
