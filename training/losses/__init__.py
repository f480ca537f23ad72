"""Losses of pairs and triplets of embeddings, as pure functions.

Embeddings are unit vectors, s is their dot product (cosine) and tau the temperature. All losses share these arguments:

- Ids (`a_ids`, `b_ids`, ...) say which rows are the same image or text. They are integers of one space for both sides
  of a loss. Two rows that share an id are never each other's negatives: the same image with another caption, the same
  text twice, a candidate that is the query itself, a hard negative that is the row's positive.
- `impl`: "plain" holds the matrix of similarities, "tiled" never does (`tiled_similarity`), "auto" chooses by size.
- `world`: each process passes its own rows, compares them with the candidates of all processes, and gets the mean over
  its own rows. The average over the processes is the loss of the joint batch.
"""

from bifocal.training.losses.info_nce import info_nce, info_nce_plus
from bifocal.training.losses.matryoshka import matryoshka
from bifocal.training.losses.sigmoid import sigmoid_loss

__all__ = ["info_nce", "info_nce_plus", "matryoshka", "sigmoid_loss"]
