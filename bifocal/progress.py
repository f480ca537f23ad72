"""Hides progress bars of steps that only take a moment, such as loading a small model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers and datasets within."""
    import datasets

    bars: list[Any] = []
    if logging.is_progress_bar_enabled():
        bars.append(logging.enable_progress_bar)
    if datasets.are_progress_bars_disabled() is False:
        bars.append(datasets.enable_progress_bars)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for show in bars:
            show()
