"""Losses of pairs and triplets of embeddings."""

from bifocal.training.losses.info_nce import info_nce, info_nce_plus, matryoshka, sigmoid_loss

__all__ = ["info_nce", "info_nce_plus", "matryoshka", "sigmoid_loss"]
