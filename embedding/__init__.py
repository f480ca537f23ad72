"""Embedding: images and texts in, vectors out, with any model, for every command that embeds many.

- `items`: an image or a text, and what a thumbnail of it is.
- `models`: loads a model, and says by a hash of its weights whether two vectors can be compared.
- `fingerprint`: a hash of all that decides the vectors of a loaded model.
- `embed`: embeds items, with thumbnails and with the reasons why some cannot be read.

A Space ships this folder with `bifocal.modeling`, `bifocal.hub.search` and `bifocal.errors`, so it imports nothing else
of Bifocal.
"""
