"""A small model in the layout of jina-clip-v2, written independently of `bifocal` and of transformers.

The text tower is XLM-R with rotary positions in the flash form, its weights adapted by LoRA as a parametrisation of
torch; the image tower is EVA02 without a head, with more pixels than its patches cover.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import SentencePieceUnigramTokenizer
from torch import nn
from torch.nn.utils import parametrize
from transformers import XLMRobertaTokenizer

from tests.hub.sources import Eva

PAD = 1
SIDE, PATCH = 31, 7  # 4 x 4 patches; 3 rows and columns of pixels are unused
LENGTH = 96  # tokens
ADAPTERS = ("retrieval.query", "text-matching")
INSTRUCTION = "Represent the query for retrieving evidence documents: "
TEXTS = [
    "a black star",
    "Ein schwarzer Stern über dem Meer",
    "",
    "une longue description d'un signe qui continue pendant bien plus de mots que les autres ici",
    "猫坐在 书桌上",
]
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Lora(nn.Module):
    """Adds alpha / rank * B A to a linear layer's weight, or A B to an embedding's, of one of several adapters."""

    def __init__(self, rows: int, columns: int, rank: int, alpha: float, embedding: bool, count: int) -> None:
        super().__init__()
        shapes = ((rows, rank), (rank, columns)) if embedding else ((rank, columns), (rows, rank))
        self.lora_A, self.lora_B = (nn.Parameter(0.2 * torch.randn(count, *shape)) for shape in shapes)
        self.embedding, self.scale = embedding, alpha / rank
        self.adapter: int | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.adapter is None:
            return weight
        a, b = self.lora_A[self.adapter], self.lora_B[self.adapter]
        return weight + self.scale * (a @ b if self.embedding else b @ a)


def turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of (rows, heads, length, d): channel k turns with channel k + d / 2."""
    first, second = x.chunk(2, dim=-1)
    d = x.shape[-1]
    angles = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


class Mixer(nn.Module):
    def __init__(self, width: int, heads: int, theta: float) -> None:
        super().__init__()
        self.heads, self.theta = heads, theta
        self.Wqkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.Wqkv(x).chunk(3, dim=-1))
        scores = turned(q, self.theta) @ turned(k, self.theta).transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~tokens[:, None, None], float("-inf"))
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Post-norm, with a GELU feed-forward."""

    def __init__(self, width: int, heads: int, inner: int, theta: float) -> None:
        super().__init__()
        self.mixer = Mixer(width, heads, theta)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-5) for _ in range(2))
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.mixer(x, tokens))
        return self.norm2(x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(x))))


class XlmRobertaFlash(nn.Module):
    def __init__(self, words: int, width: int = 64, heads: int = 4, inner: int = 96, layers: int = 2, theta=20_000.0):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(words, width)
        self.embeddings.token_type_embeddings = nn.Embedding(1, width)
        self.emb_ln = nn.LayerNorm(width, eps=1e-5)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block(width, heads, inner, theta) for _ in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids != PAD
        types = self.embeddings.token_type_embeddings(torch.zeros_like(ids))
        x = self.emb_ln(self.embeddings.word_embeddings(ids) + types)
        for layer in self.encoder.layers:
            x = layer(x, tokens)
        return (x * tokens[..., None]).sum(1) / tokens.sum(1, keepdim=True)


class JinaClipV2(nn.Module):
    """Both towers; `adapter` is the position of the adapter that is used."""

    def __init__(
        self, words: int, rank: int = 4, alpha: float = 6, theta: float = 20_000.0, count: int = len(ADAPTERS),
        text: Mapping[str, int] = {}, image: Mapping[str, int] = {"patch": PATCH},
    ) -> None:  # fmt: skip
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.transformer = nn.Module()
        self.text_model.transformer.roberta = XlmRobertaFlash(words, theta=theta, **text)
        self.vision_model = Eva(head=0, stored=False, **image)
        self.logit_scale = nn.Parameter(torch.tensor(3.3))
        for module in list(self.text_model.modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                lora = Lora(*module.weight.shape, rank, alpha, isinstance(module, nn.Embedding), count)
                parametrize.register_parametrization(module, "weight", lora)

    def use(self, adapter: str | None) -> "JinaClipV2":
        for module in self.modules():
            if isinstance(module, Lora):
                module.adapter = None if adapter is None else ADAPTERS.index(adapter)
        return self

    @torch.no_grad()
    def encode_text(self, texts: list[str], words: Any) -> np.ndarray:
        """All texts in one batch, so that most of them are padded."""
        ids = words(texts, padding=True, return_tensors="pt")["input_ids"]
        return nn.functional.normalize(self.text_model.transformer.roberta(ids), dim=-1).numpy()

    @torch.no_grad()
    def encode_image(self, images: list[Image.Image]) -> np.ndarray:
        """The shorter side is resized, then the middle is taken."""
        pixels = []
        for image in images:
            width, height = image.size
            short = min(width, height)
            size = (SIDE * width // short, SIDE * height // short)
            resized = image.resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
            part = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
            pixels.append(((part - np.array(_MEAN)) / np.array(_STD)).transpose(2, 0, 1))
        return nn.functional.normalize(self.vision_model(torch.tensor(np.stack(pixels)).float()), dim=-1).numpy()


def config(**changes: Any) -> dict[str, Any]:
    """The content of config.json, as in the published one: of the text tower, only what differs is there."""
    kwargs = {
        "load_trained_adapters": False, "lora_adaptations": list(ADAPTERS), "lora_alpha": 6, "lora_dropout_p": 0.0,
        "lora_main_params_trainable": False, "lora_rank": 4, "task_instructions": {ADAPTERS[0]: INSTRUCTION},
        "use_flash_attn": True, "num_attention_heads": 4, "max_position_embeddings": LENGTH + 2,
    }  # fmt: skip
    text = {
        "model_type": "jina_clip_text", "embed_dim": 64, "hf_model_name_or_path": "jinaai/jina-embeddings-v3",
        "default_instruction_task": None, "default_lora_task": ADAPTERS[0], "pooler_type": "mean_pooler",
        "proj_bias": False, "proj_type": None,
    }  # fmt: skip
    vision = {
        "model_type": "jina_clip_vision", "embed_dim": 64, "width": 64, "image_size": SIDE, "patch_size": PATCH,
        "layers": 2, "head_width": 32, "mlp_ratio": 1.5, "ls_init_value": None, "patch_dropout": 0.1, "qkv_bias": True,
        "fused_layer_norm": False, "x_attention": True, "post_norm": False, "rope_embeddings": True,
        "pt_hw_seq_len": 16, "intp_freq": True, "naive_swiglu": True, "subln": True, "proj_type": None,
    }  # fmt: skip
    # A change of None removes a key.
    text |= {key: changes.pop(key) for key in list(changes) if key in text}
    vision |= {key: changes.pop(key) for key in list(changes) if key in vision}
    top = {
        "model_type": "jina_clip", "auto_map": {"AutoModel": "jinaai/elsewhere--modeling_clip.JinaCLIPModel"},
        "add_projections": False, "projection_dim": 64, "logit_scale_init_value": 2.6592, "truncate_dim": None,
        "matryoshka_dimensions": [8, 32, 64], "torch_dtype": "bfloat16", "transformers_version": "4.46.1",
    }  # fmt: skip
    top |= {key: changes.pop(key) for key in list(changes) if key in top}
    kwargs = {key: value for key, value in (kwargs | changes).items() if value is not None}
    return top | {"text_config": text | {"hf_model_config_kwargs": kwargs}, "vision_config": vision}


def build(words: int = 160, **options: Any) -> JinaClipV2:
    torch.manual_seed(0)
    model = JinaClipV2(words, **options).eval()
    with torch.no_grad():  # nothing at its initial value, or a mistake could pass
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokenizer() -> XLMRobertaTokenizer:
    """A small Unigram tokenizer with XLM-R's special tokens."""
    trained = SentencePieceUnigramTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        [*TEXTS, INSTRUCTION] * 5, vocab_size=150, show_progress=False, special_tokens=special, unk_token="<unk>"
    )
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    return XLMRobertaTokenizer(vocab=[tuple(entry) for entry in vocabulary], model_max_length=LENGTH + 2)


def save(folder: Path, model: JinaClipV2, words: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write the model as the published repository has it."""
    folder.mkdir(parents=True)
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    settings = {
        "image_processor_type": "JinaCLIPImageProcessor", "processor_class": "JinaCLIPProcessor", "size": SIDE,
        "auto_map": {"AutoImageProcessor": "jinaai/elsewhere--processing_clip.JinaCLIPImageProcessor"},
        "fill_color": 0, "interpolation": "bicubic", "mean": _MEAN, "std": _STD, "resize_mode": "shortest",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
