"""Kinds of rows: what a source can be read as, and the columns of each."""

COLUMNS = {
    "image-text": ("image", "caption"),
    "text-pair": ("query", "positive"),
    "text-triplet": ("query", "positive", "negatives"),
}
# Besides the kinds of training tasks: texts for masked language modelling, images for captioning, labelled images and
# scored pairs of texts for evaluation.
KINDS = {
    **COLUMNS,
    "text-only": ("text",),
    "image-only": ("image",),
    "image-label": ("image", "label"),
    "scored-pair": ("first", "second", "score"),
}
