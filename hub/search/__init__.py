"""Search over pictures and texts: an index of a model's vectors, a page, and the way into a vector database.

A Space ships this folder and `bifocal.modeling` as they are, so it imports nothing else of Bifocal.
"""
