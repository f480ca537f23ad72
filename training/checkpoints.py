"""Checkpoints of a run's folder: find the one to resume from, and remove an earlier run."""

import json
import re
import shutil
from itertools import count
from pathlib import Path

from bifocal.data.skips import require_log, start_log
from bifocal.files import RUN, NotOursError, remove_folder, require_overwritable, require_removable
from bifocal.training.engine.distributed import on_main_process

LOADING_LOG = "skipped-loading.jsonl"  # rows skipped while the data is loaded
_OTHER_LOGS = "skipped-[0-9]*.jsonl"  # of the other processes of a run
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # as transformers' Trainer names them, and takes them for its own

# What the Trainer, peft, accelerate and this package write into one; there is no list of its files.
_WRITTEN = re.compile(
    r"((model|pytorch_model|adapter_model|raw_weights|average)[\w.-]*\.(safetensors|bin)(\.index\.json)?"
    r"|(optimizer|scheduler|scaler|rng_state)[\w.-]*\.(pt|pth|bin)|training_args\.bin"
    r"|(trainer_state|bifocal_state_\d+|config|generation_config|adapter_config|preprocessor_config|processor_config"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(vocab|merges)\.txt|[\w.-]+\.model"
    r"|chat_template\.jinja|\w+_bifocal(_\w+)?\.py|README\.md|__pycache__"
    r"|global_step\d+|latest|zero_to_fp32\.py|(optimizer|pytorch_model)_(fsdp_)?\d+)"
)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of transformers' Trainer in `folder`; None if there is none.

    The Trainer writes `trainer_state.json` last, so a checkpoint in which it is missing or cut short was being saved
    when the run was killed, or somebody removed that file. It gets another name, since the Trainer would count it as
    its newest. Of several processes only the main one does this, and all get its answer: they must call it together.
    """
    return on_main_process(lambda: _last_complete_checkpoint(folder))


def _last_complete_checkpoint(folder: Path) -> Path | None:
    numbered = []
    for path in checkpoints(folder):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            numbered.append((int(path.name.partition("-")[2]), path))
        except (OSError, ValueError):
            _set_aside(path)
    return max(numbered)[1] if numbered else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, complete or not."""
    return [
        path
        for path in sorted(folder.glob("checkpoint-*"))
        if _CHECKPOINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _set_aside(path: Path) -> None:
    names = (f"incomplete-{path.name}" + (f"-{number}" if number > 1 else "") for number in count(1))
    aside = next(other for other in map(path.with_name, names) if not other.exists())
    path.rename(aside)
    print(f"'{path}' was not saved completely. It is now '{aside.name}', which you may delete.")


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run's folder.

    Raises:
        NotOursError: if one holds a file that training does not write; then nothing is removed.
    """
    _require_checkpoints(folder)
    for path in checkpoints(folder):
        shutil.rmtree(path)


def _require_checkpoints(folder: Path) -> None:
    for path in checkpoints(folder):
        other = next((entry.name for entry in sorted(path.iterdir()) if not _WRITTEN.fullmatch(entry.name)), None)
        if other is not None:
            raise NotOursError(f"'{path}' holds '{other}', which training did not write; move it away.")


def clear_run(folder: Path, *files: str) -> None:
    """Remove a run's checkpoints, model, processor, logs of skipped rows and files of these names from its folder.

    Raises:
        NotOursError: if one of these is not as Bifocal wrote it; then nothing is removed.
    """
    require_clearable(folder, *files)
    remove_checkpoints(folder)
    for name in ("model", "processor"):
        remove_folder(folder / name, RUN)
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for log in _logs(folder):
        start_log(log)


def _logs(folder: Path) -> list[Path]:
    return [folder / LOADING_LOG, folder / "skipped.jsonl", *sorted(folder.glob(_OTHER_LOGS))]


def require_clearable(folder: Path, *files: str) -> None:
    """Check that `clear_run` may remove what it would remove.

    Raises:
        NotOursError: if it may not.
    """
    for name in files:
        require_overwritable(folder / name, RUN)
    for log in _logs(folder):
        require_log(log)
    _require_checkpoints(folder)
    for name in ("model", "processor"):
        require_removable(folder / name, RUN)
