"""Search over images and texts: an index of a model's vectors, a page, and the export to a vector database.

A Space ships this folder with `bifocal.embedding`, `bifocal.modeling` and `bifocal.errors`, so it imports nothing else
of Bifocal.
"""
