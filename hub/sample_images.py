"""Sample inputs free of any licence: simple drawings with texts, to compare a model's ONNX and torch vectors on."""

import math
from collections.abc import Iterator

from PIL import Image, ImageDraw

_COLOURS = {
    "red": "#d0312d", "blue": "#1f5fbf", "green": "#2e8b57", "orange": "#e08214",
    "purple": "#7b3fa0", "brown": "#7a4b2a", "pink": "#e377a2", "black": "#202020",
}  # fmt: skip
_SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "stripe")
_SIDE = 224


def sample_pairs() -> Iterator[tuple[str, Image.Image]]:
    """Yield 64 pairs of a text and the image it describes, always the same; consecutive pairs share no word."""
    for turn in range(len(_SHAPES)):
        for number, (colour, code) in enumerate(_COLOURS.items()):
            shape = _SHAPES[(number + turn) % len(_SHAPES)]
            yield f"a {colour} {shape}", _draw(shape, code)


def _draw(shape: str, colour: str) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    pen = ImageDraw.Draw(image)
    low, middle, high = _SIDE // 5, _SIDE // 2, _SIDE - _SIDE // 5
    arm = _SIDE // 12
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=colour)
    elif shape == "triangle":
        pen.polygon([(middle, low), (high, high), (low, high)], fill=colour)
    elif shape == "star":
        corners = []
        for point in range(10):
            radius = (high - low) / (2 if point % 2 == 0 else 5)
            angle = math.pi * point / 5 - math.pi / 2
            corners.append((middle + radius * math.cos(angle), middle + radius * math.sin(angle)))
        pen.polygon(corners, fill=colour)
    elif shape == "cross":
        pen.rectangle((middle - arm, low, middle + arm, high), fill=colour)
        pen.rectangle((low, middle - arm, high, middle + arm), fill=colour)
    elif shape == "ring":
        pen.ellipse((low, low, high, high), outline=colour, width=2 * arm)
    elif shape == "diamond":
        pen.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], fill=colour)
    else:
        pen.rectangle((0, middle - arm, _SIDE, middle + arm), fill=colour)
    return image


def long_text(words: int) -> str:
    """Return a text of this many words, followed by half as many that must not matter once it is truncated."""
    texts = [text for text, _ in sample_pairs()]
    kept, cut = " ".join(texts[:32]).split(), " ".join(texts[32:]).split()
    return " ".join([kept[n % len(kept)] for n in range(words)] + [cut[n % len(cut)] for n in range(words // 2 + 1)])
