"""A folder with a dual encoder of random weights, for benchmarks that start the commands of users."""

from collections.abc import Sequence
from pathlib import Path


def random_model(folder: Path, texts: Sequence[str], width: int, layers: int) -> Path:
    """Export a model with two towers of this size and a tokenizer of these texts, and return its folder."""
    import torch

    from bifocal.hub.export import export_model
    from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
    from bifocal.modeling.processing_bifocal import image_processor_of_size
    from bifocal.training.tokenizer import train_wordpiece

    torch.manual_seed(0)
    tower = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
    text = {**tower, "vocab_size": 320, "intermediate_size": 4 * width, "max_position_embeddings": 512}
    vision = {**tower, "intermediate_size": 8 * width // 3, "image_size": 224, "patch_size": 16}
    model = BifocalModel(BifocalConfig(text_config=text, vision_config=vision, projection_dim=width))
    processor = BifocalProcessor(image_processor_of_size(224), train_wordpiece(list(texts), 300, 512))
    return Path(export_model(model, folder, processor))
