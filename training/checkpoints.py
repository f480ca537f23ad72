"""Finding the checkpoint to go on from after a run was killed, possibly while it saved one."""

import json
import shutil
from pathlib import Path


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of transformers' Trainer in `folder` that was saved whole; None if there is none.

    The Trainer writes `trainer_state.json` last, so a checkpoint in which it is missing or cut short was being saved
    when the run was killed. Such a one is removed, or the Trainer would take it for its newest.
    """
    numbered = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdigit():
            continue
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            numbered.append((int(number), path))
        except (OSError, ValueError):
            shutil.rmtree(path)
    return max(numbered)[1] if numbered else None
