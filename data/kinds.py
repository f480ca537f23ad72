"""Kinds of rows that a source can be read as, and their columns."""

from typing import Literal

TaskKind = Literal["image-text", "text-pair", "text-triplet"]  # of training tasks
CorpusKind = Literal[TaskKind, "text-only"]  # of public corpora
COLUMNS = {
    "image-text": ("image", "caption"),
    "text-pair": ("query", "positive"),
    "text-triplet": ("query", "positive", "negatives"),
}
# The kinds of training tasks, and: texts for masked language modelling, images for captioning, labelled images and
# scored pairs of texts for evaluation.
KINDS = {
    **COLUMNS,
    "text-only": ("text",),
    "image-only": ("image",),
    "image-label": ("image", "label"),
    "scored-pair": ("first", "second", "score"),
}
# The kinds that are inferred from a source's columns, in the order in which they are tried.
INFERRED: tuple[CorpusKind, ...] = ("text-triplet", "image-text", "text-pair", "text-only")
INDEXED = ("image-text", "image-only", "text-pair", "text-only")  # the kinds that a search index is built from
