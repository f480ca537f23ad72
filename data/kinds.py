"""Kinds of rows that a source can be read as, and their columns."""

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
