"""ONNX files of the two towers, in float32 and with int8 weights, and what they lose against torch."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bifocal.errors import BifocalError
from bifocal.hub.export import with_limit
from bifocal.modeling import BifocalModel, BifocalProcessor

OPSET = 20
TOLERANCE = 1e-4  # largest difference of a unit vector's component from torch's
# Names as transformers.js looks for them.
FILES = {"text": "text_model", "image": "vision_model"}
PRECISIONS = ("float32", "int8")
_BATCH = 32
_EXTERNAL = 1_900_000_000  # bytes; a protobuf file holds 2 GiB at most, larger weights go beside it


class OnnxError(BifocalError):
    """What is wrong with an ONNX file, in one sentence."""


class _TextTower(torch.nn.Module):
    def __init__(self, model: BifocalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = self.model.get_text_features(input_ids, attention_mask).pooler_output
        return torch.nn.functional.normalize(features, dim=-1)


class _ImageTower(torch.nn.Module):
    def __init__(self, model: BifocalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.model.get_image_features(pixel_values).pooler_output, dim=-1)


def file_name(tower: str, precision: str) -> str:
    return f"{FILES[tower]}.onnx" if precision == "float32" else f"{FILES[tower]}_{precision}.onnx"


def export_onnx(model: BifocalModel, folder: Path) -> None:
    """Write `text_model.onnx` and `vision_model.onnx`, and both with int8 weights.

    Batch and text length are free; a text longer than `max_position_embeddings` is an error, as it is for the model.
    Outputs are unit vectors, `text_embeds` and `image_embeds` (batch, projection_dim).
    In the int8 files the weights of matrix products are bytes, and their inputs are quantised as they come (dynamic
    quantisation of ONNX Runtime).

    Raises:
        OnnxError: a file that is not of the opset or the size that it should be of.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir(parents=True, exist_ok=True)
    tokens = torch.tensor([[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]]) % model.config.text_config.vocab_size
    side, channels = model.config.vision_config.image_size, model.config.vision_config.num_channels
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=2, max=model.config.text_config.max_position_embeddings)
    text_shape = {0: batch, 1: length}
    was_training = model.training
    model.eval()
    try:
        for tower, module, inputs, shapes in (
            ("text", _TextTower(model), {"input_ids": tokens, "attention_mask": (tokens != 0).long()},
             {"input_ids": text_shape, "attention_mask": text_shape}),
            ("image", _ImageTower(model), {"pixel_values": torch.zeros(2, channels, side, side)},
             {"pixel_values": {0: batch}}),
        ):  # fmt: skip
            path = folder / file_name(tower, "float32")
            own = module.model.text_model if tower == "text" else module.model.vision_model
            size = sum(parameter.numel() * 4 for parameter in own.parameters())
            with quietly(), torch.no_grad():
                torch.onnx.export(
                    module.eval(), (), str(path), kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False,
                    input_names=list(inputs), output_names=[f"{tower}_embeds"], opset_version=OPSET,
                    external_data=size > _EXTERNAL,
                )  # fmt: skip
                if tower == "text":
                    _refuse_longer(path, model.config.text_config.max_position_embeddings)
                quantize_dynamic(
                    str(path), str(folder / file_name(tower, "int8")), weight_type=QuantType.QInt8,
                    use_external_data_format=size > _EXTERNAL,
                )  # fmt: skip
            _check(path, size)
    finally:
        model.train(was_training)


def _refuse_longer(path: Path, limit: int) -> None:
    """Make a text tower's graph fail for more than `limit` tokens, which it would embed without notice.

    ONNX has no assertion. Reading beyond the end of a table is one, and ONNX Runtime names the node in its message.
    """
    import onnx
    from onnx import helper, numpy_helper

    loaded = onnx.load(str(path), load_external_data=False)
    name = f"truncate_texts_to_{limit}_tokens"
    length, zero, checked = f"{name}.length", f"{name}.zero", f"{name}.input_ids"
    for node in loaded.graph.node:
        node.input[:] = [checked if given == "input_ids" else given for given in node.input]
    table = numpy_helper.from_array(np.zeros(limit + 1, np.int64), f"{name}.table")
    loaded.graph.initializer.append(table)
    for node in (
        helper.make_node("Add", ["input_ids", zero], [checked]),
        helper.make_node("Gather", [table.name, length], [zero], name=name, axis=0),
        helper.make_node("Shape", ["input_ids"], [length], start=1, end=2),
    ):
        loaded.graph.node.insert(0, node)
    onnx.save(loaded, str(path))


def _check(path: Path, parameters: int) -> None:
    """
    Args:
        parameters: bytes of the tower's parameters in float32.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=False)
    loaded = onnx.load(str(path), load_external_data=False)
    opset = next(entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx"))
    if opset != OPSET:
        raise OnnxError(f"'{path.name}' is of opset {opset} and not {OPSET}; export with another release of onnx.")
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    # Beyond the weights: the projection, the graph, and tables made of the configuration.
    if not 0.9 * parameters < size < 1.2 * parameters + 8 * 2**20:
        raise OnnxError(f"'{path.name}' has {size:,} bytes where its weights have {parameters:,}; something is amiss.")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep libraries silent: the exporter misses torchvision each time, quantisation would like one more pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class OnnxEncoder:
    """Texts and pictures to unit vectors by the ONNX files of a folder.

    Args:
        folder: with the files.
        processor: of the model.
        precision: "float32" or "int8".

    Raises:
        OnnxError: the files are not there.
    """

    def __init__(self, folder: Path, processor: BifocalProcessor, precision: str = "float32") -> None:
        import onnxruntime

        missing = next((name for t in FILES if not (folder / (name := file_name(t, precision))).exists()), None)
        if missing is not None:
            raise OnnxError(f"There is no '{missing}' in '{folder}'; export the model with ONNX.")
        self.processor = processor
        self.sessions = {
            tower: onnxruntime.InferenceSession(
                str(folder / file_name(tower, precision)), providers=["CPUExecutionProvider"]
            )
            for tower in FILES
        }

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, dimensions) in float32; texts are cut at the tokenizer's limit."""
        found = []
        for start in range(0, len(texts), _BATCH):
            words = self.processor(text=list(texts[start : start + _BATCH]), return_tensors="np")
            inputs = {name: words[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
            found.append(self.sessions["text"].run(None, inputs)[0])
        return np.concatenate(found)

    def encode_image(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(pictures, dimensions) in float32."""
        found = []
        for start in range(0, len(pictures), _BATCH):
            pixels = self.processor(images=list(pictures[start : start + _BATCH]), return_tensors="np")["pixel_values"]
            found.append(self.sessions["image"].run(None, {"pixel_values": np.asarray(pixels, np.float32)})[0])
        return np.concatenate(found)


def measure(
    model: BifocalModel, folder: Path, texts: Sequence[str], pictures: Sequence[Image.Image], of: str
) -> dict[str, Any]:
    """Compare the files with torch on texts and the pictures they describe.

    Args:
        folder: with the files.
        texts, pictures: equally many, number i of both belonging together.
        of: what they are, for the card.

    Returns:
        `files`: by path in the repository `bytes` and, of float32, the `largest_difference` of a component, of int8
        `mean_cosine` and `lowest_cosine` to torch's vectors. `recall`: Recall@5 from text to picture in both
        precisions; a wrong picture as similar as the right one counts as found before it.

    Raises:
        OnnxError: a float32 file differs by more than 1e-4.
    """
    exact = {
        "text": model.encode_text(list(texts), show_progress=False),
        "image": model.encode_image(list(pictures), show_progress=False),
    }
    processor = with_limit(model.processor, model)
    files: dict[str, dict[str, float]] = {}
    recall: dict[str, Any] = {"pairs": len(texts), "of": of}
    for precision in PRECISIONS:
        encoder = OnnxEncoder(folder, processor, precision)
        found = {"text": encoder.encode_text(texts), "image": encoder.encode_image(pictures)}
        for tower, vectors in found.items():
            name = file_name(tower, precision)
            facts: dict[str, float] = {"bytes": sum(file.stat().st_size for file in folder.glob(f"{name}*"))}
            if precision == "float32":
                facts["largest_difference"] = float(np.abs(vectors - exact[tower]).max())
                if facts["largest_difference"] > TOLERANCE:
                    raise OnnxError(
                        f"'{name}' differs from torch by {facts['largest_difference']:.1e}, more than {TOLERANCE:.0e}; "
                        "do not use it."
                    )
            else:
                cosines = (vectors * exact[tower]).sum(axis=1) / np.linalg.norm(vectors, axis=1)
                facts |= {"mean_cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min())}
            files[f"{folder.name}/{name}"] = facts
        scores = found["text"] @ found["image"].T
        better = (scores >= np.diag(scores)[:, None]).sum(axis=1) - 1
        recall[precision] = float((better < 5).mean())
    return {"opset": OPSET, "precisions": list(PRECISIONS), "files": files, "recall": recall}
