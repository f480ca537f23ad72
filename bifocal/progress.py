"""Silence where a progress bar would say nothing: a model that is written or read in a moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within, transformers and datasets draw no bars for what they read, make and write."""
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
