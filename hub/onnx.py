"""Exports the two towers to ONNX, in float32 and with int8 weights, and compares the files with torch."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bifocal.errors import BifocalError, first_line
from bifocal.hub.export import with_model_max_length
from bifocal.hub.tower_facts import keeps_shape, tower_facts
from bifocal.modeling import BifocalModel, BifocalProcessor

OPSET = 20
TOLERANCE = 1e-4  # largest difference of a unit vector's component from torch's
# The names that transformers.js reads.
FILES = {"text": "text_model", "image": "vision_model"}
PRECISIONS = ("float32", "int8")
WITHOUT_ONNX = "Pass --no-onnx."  # remedy of `bifocal export`
_BATCH = 32
_EXTERNAL = 1_900_000_000  # bytes; a protobuf file holds 2 GiB at most, larger weights need a file of their own


class OnnxError(BifocalError):
    """An ONNX file that is missing or not usable."""


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
    """Return the name of a tower's file."""
    return f"{FILES[tower]}.onnx" if precision == "float32" else f"{FILES[tower]}_{precision}.onnx"


def export_onnx(model: BifocalModel, folder: Path, towers: Sequence[str] = tuple(FILES)) -> None:
    """Write `text_model.onnx` and `vision_model.onnx`, and both with int8 weights; or only some of the towers.

    Batch size and text length are dynamic; a text longer than `max_text_length` is an error, as for the model.
    Outputs are unit vectors, `text_embeds` and `image_embeds` (batch, projection_dim).
    The int8 files use ONNX Runtime's dynamic quantisation: weights of matrix products are int8, and their inputs are
    quantised at run time.

    Raises:
        OnnxError: if the model cannot be exported, or a file does not have the expected opset or size.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if "image" in towers and keeps_shape(model.processor.image_processor):
        raise OnnxError(f"Its image processor keeps the shape of images, which an ONNX file cannot. {WITHOUT_ONNX}")
    folder.mkdir(parents=True, exist_ok=True)
    words = with_model_max_length(model.processor, model)(text=["a red circle", "star"], return_tensors="pt")
    limit = model.config.max_text_length
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=2, max=limit)
    text_shape = {0: batch, 1: length}
    facts = tower_facts(model)
    was_training = model.training
    model.eval()
    try:
        for tower in towers:
            if tower == "text":
                module: torch.nn.Module = _TextTower(model)
                inputs = {name: words[name] for name in ("input_ids", "attention_mask")}
                shapes = {"input_ids": text_shape, "attention_mask": text_shape}
            else:
                pixels = model.processor(images=[Image.new("RGB", (64, 48))] * 2, return_tensors="pt")["pixel_values"]
                module = _ImageTower(model)
                inputs = {"pixel_values": torch.zeros_like(pixels, dtype=torch.float32)}
                shapes = {"pixel_values": {0: batch}}
            path = folder / file_name(tower, "float32")
            size = 4 * facts[tower]["parameters"]
            with quietly(), torch.no_grad():
                try:
                    torch.onnx.export(
                        module.eval(), (), str(path), kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False,
                        input_names=list(inputs), output_names=[f"{tower}_embeds"], opset_version=OPSET,
                        external_data=size > _EXTERNAL,
                    )  # fmt: skip
                except torch.onnx.errors.OnnxExporterError as error:
                    raise OnnxError(
                        f"The {tower} tower, a {facts[tower]['family']}, cannot be exported to ONNX "
                        f"({first_line(error)}). {WITHOUT_ONNX}"
                    ) from error
                if tower == "text":
                    _add_length_check(path, limit)
                quantize_dynamic(
                    str(path), str(folder / file_name(tower, "int8")), weight_type=QuantType.QInt8,
                    use_external_data_format=size > _EXTERNAL,
                )  # fmt: skip
            _check_file(path, size)
    finally:
        model.train(was_training)


def _add_length_check(path: Path, limit: int) -> None:
    """Make a text tower's graph fail for more than `limit` tokens, which it would embed without an error.

    ONNX has no assertion, but reading beyond the end of a table fails, and ONNX Runtime names the node in its message.
    """
    import onnx
    from onnx import helper, numpy_helper

    loaded = onnx.load(str(path), load_external_data=False)
    name = f"truncate_texts_to_{limit}_tokens"
    length, zero = f"{name}.length", f"{name}.zero"
    checked = {value: f"{name}.{value}" for value in ("input_ids", "attention_mask")}
    for node in loaded.graph.node:  # of both inputs, or a node that only needs the mask could fail first
        node.input[:] = [checked.get(value, value) for value in node.input]
    table = numpy_helper.from_array(np.zeros(limit + 1, np.int64), f"{name}.table")
    loaded.graph.initializer.append(table)
    for node in (
        *(helper.make_node("Add", [value, zero], [output]) for value, output in checked.items()),
        helper.make_node("Gather", [table.name, length], [zero], name=name, axis=0),
        helper.make_node("Shape", ["input_ids"], [length], start=1, end=2),
    ):
        loaded.graph.node.insert(0, node)
    onnx.save(loaded, str(path))


def _check_file(path: Path, parameters: int) -> None:
    """Check a file's opset and size.

    Args:
        path: path of the file.
        parameters: bytes of the tower's parameters in float32.

    Raises:
        OnnxError: if one of them is not as expected.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=False)
    loaded = onnx.load(str(path), load_external_data=False)
    opset = next(entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx"))
    if opset != OPSET:
        raise OnnxError(f"'{path.name}' has opset {opset}, not {OPSET}. Export with another release of onnx.")
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    # Besides the weights, a file holds the graph and tables that follow from the configuration.
    if not 0.9 * parameters < size < 1.2 * parameters + 8 * 2**20:
        raise OnnxError(
            f"'{path.name}' has {size:,} bytes, but its weights have {parameters:,}. Export with another onnx release."
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Silence warnings, such as those of the exporter (no torchvision) and of quantisation (no preprocessing)."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class OnnxEncoder:
    """Encodes texts and images with the ONNX files of a folder.

    Args:
        folder: folder of the files.
        processor: processor of the model.
        precision: "float32" or "int8".
        towers: those to load.
        no_overflow: with int8, multiply without the overflow of x86 processors that lack VNNI, which makes vectors less
            exact there; other processors and browsers have none. It is slower.

    Raises:
        OnnxError: if a file is missing.
    """

    def __init__(
        self, folder: Path, processor: BifocalProcessor, precision: str = "float32",
        towers: Sequence[str] = tuple(FILES), no_overflow: bool = False,
    ) -> None:  # fmt: skip
        import onnxruntime

        missing = next((name for t in towers if not (folder / (name := file_name(t, precision))).exists()), None)
        if missing is not None:
            raise OnnxError(f"'{missing}' is missing in '{folder}'. Export the model with ONNX.")
        self.processor = processor
        options = onnxruntime.SessionOptions()
        if no_overflow:
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.sessions = {
            tower: onnxruntime.InferenceSession(
                str(folder / file_name(tower, precision)), options, providers=["CPUExecutionProvider"]
            )
            for tower in towers
        }

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit vectors (texts, dimensions) in float32; texts are truncated at the tokenizer's limit."""
        batches = []
        for start in range(0, len(texts), _BATCH):
            words = self.processor(text=list(texts[start : start + _BATCH]), return_tensors="np")
            inputs = {name: words[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
            batches.append(self.sessions["text"].run(None, inputs)[0])
        return np.concatenate(batches)

    def encode_image(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return unit vectors (images, dimensions) in float32."""
        batches = []
        for start in range(0, len(images), _BATCH):
            pixels = self.processor(images=list(images[start : start + _BATCH]), return_tensors="np")["pixel_values"]
            batches.append(self.sessions["image"].run(None, {"pixel_values": np.asarray(pixels, np.float32)})[0])
        return np.concatenate(batches)


def compare_with_torch(
    model: BifocalModel, folder: Path, texts: Sequence[str], images: Sequence[Image.Image], data_name: str
) -> dict[str, Any]:
    """Compare the files with torch on texts and the images that they describe.

    Args:
        model: the model that the files were exported from.
        folder: folder of the files.
        texts, images: pairs; text i describes image i.
        data_name: name of these pairs on the card.

    Returns:
        `files`: by path in the repository, `bytes` and for float32 the `largest_difference` of a component, for int8
        `mean_cosine` and `lowest_cosine` to torch's vectors. `recall`: text-to-image Recall@5 in both precisions; a
        wrong image that is as similar as the right one counts as ranked before it.

    Raises:
        OnnxError: if a float32 file differs by more than 1e-4.
    """
    exact = {
        "text": model.encode_text(list(texts), show_progress=False),
        "image": model.encode_image(list(images), show_progress=False),
    }
    processor = with_model_max_length(model.processor, model)
    files: dict[str, dict[str, float]] = {}
    recall: dict[str, Any] = {"pairs": len(texts), "of": data_name}
    for precision in PRECISIONS:
        encoder = OnnxEncoder(folder, processor, precision)
        encoded = {"text": encoder.encode_text(texts), "image": encoder.encode_image(images)}
        for tower, vectors in encoded.items():
            name = file_name(tower, precision)
            size = sum(file.stat().st_size for file in folder.glob(f"{name}*"))
            files[f"{folder.name}/{name}"] = {"bytes": size, **compare_vectors(tower, precision, vectors, exact[tower])}
        scores = encoded["text"] @ encoded["image"].T
        better = (scores >= np.diag(scores)[:, None]).sum(axis=1) - 1
        recall[precision] = float((better < 5).mean())
    return {"opset": OPSET, "precisions": list(PRECISIONS), "files": files, "recall": recall}


def compare_vectors(tower: str, precision: str, vectors: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return the `largest_difference` of a float32 file's vectors from torch's; of an int8 file's, cosines to them.

    Args:
        tower, precision: which file it is.
        vectors: unit vectors (items, dimensions) that the file gives.
        exact: those of torch.

    Raises:
        OnnxError: if a float32 file differs by more than 1e-4.
    """
    if precision == "int8":
        cosines = (vectors * exact).sum(axis=1) / np.linalg.norm(vectors, axis=1)
        return {"mean_cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min())}
    largest = float(np.abs(vectors - exact).max())
    if largest > TOLERANCE:
        raise OnnxError(
            f"'{file_name(tower, precision)}' differs from torch by {largest:.1e}, more than {TOLERANCE:.0e}. Do not "
            "use it."
        )
    return {"largest_difference": largest}
