"""Small random models of other families, with tokenizers and image processors, as their users have them in folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.bit import BitImageProcessorPil
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil
from transformers.models.vit import ViTImageProcessorPil

SIDE = 32
LENGTH = 24
TEXTS = [
    "a cat",
    "a small drawing of a red square above two blue circles on white ground",
    "rain",
    "Über den Wolken, far away",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen",
]
_WORDS = [*TEXTS, "the quick brown fox jumps over the lazy dog", "pictures and words in one space"]
_TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
_IMAGE = dict(_TEXT, image_size=SIDE, patch_size=8)
_CLIP_IMAGES = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def tokenizer(style: str = "bert", length: int = LENGTH) -> PreTrainedTokenizerFast:
    """Return a small tokenizer with the special tokens and their ids of a family: "bert", "clip", "xlm-r" or "siglip".

    The kinds of real tokenizers are tested beside the processor; here, their special tokens matter.
    """
    bert = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    xlm_r = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    special, template, single = {
        "bert": (bert, "[CLS] $A [SEP]", ("[CLS]", "[SEP]")),
        "xlm-r": (xlm_r | {"cls": "<s>", "sep": "</s>"}, "<s> $A </s>", ("<s>", "</s>")),
        "clip": ({"bos": "<start>", "eos": "<end>", "pad": "<end>", "unk": "<end>"}, "<start> $A <end>",
                 ("<start>", "<end>")),
        "siglip": ({"unk": "<unk>", "eos": "</s>", "pad": "<pad>"}, "$A </s>", ("</s>",)),
    }[style]  # fmt: skip
    backend = Tokenizer(models.WordPiece(unk_token=special["unk"]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    tokens = list(dict.fromkeys(special.values()))
    backend.train_from_iterator(_WORDS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=tokens))
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, backend.token_to_id(token)) for token in single]
    )
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names)


def _clip(prefix: str, style: str = "clip", **text: Any) -> tuple[Any, Any]:
    words = tokenizer(style)
    ends = dict(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    settings = dict(_TEXT, vocab_size=160, max_position_embeddings=LENGTH, projection_dim=24, **ends) | text
    config = getattr(transformers, f"{prefix}Config")(
        text_config=settings, vision_config=dict(_IMAGE, projection_dim=24), projection_dim=24
    )
    model = getattr(transformers, f"{prefix}Model")(config)
    kind = "ChineseCLIPProcessor" if prefix == "ChineseCLIP" else "CLIPProcessor"
    return model, getattr(transformers, kind)(CLIPImageProcessorPil(**_CLIP_IMAGES), words)


def _siglip(second: bool = False) -> tuple[Any, Any]:
    words = tokenizer("siglip")
    # SigLIP 2 of a fixed size is a SigLIP whose tokenizer has another padding token than the configuration says.
    pad = {} if second else {"pad_token_id": words.pad_token_id}
    config = transformers.SiglipConfig(
        text_config=dict(_TEXT, vocab_size=160, max_position_embeddings=LENGTH, projection_size=32, **pad),
        vision_config=_IMAGE,
    )
    model = transformers.SiglipModel(config)
    with torch.no_grad():  # as in the published weights
        model.logit_scale.fill_(4.765)
        model.logit_bias.fill_(-12.9)
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return model, transformers.SiglipProcessor(images, words)


DUAL_ENCODERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "CLIP": lambda: _clip("CLIP"),
    "MetaCLIP 2": lambda: _clip("MetaClip2"),
    "Chinese-CLIP": lambda: _clip("ChineseCLIP", "bert", type_vocab_size=2),
    "AltCLIP": lambda: _clip("AltCLIP", "xlm-r", project_dim=28, max_position_embeddings=LENGTH + 2, type_vocab_size=1),
    "SigLIP": lambda: _siglip(),
    "SigLIP 2": lambda: _siglip(second=True),
}


def _text(name: str, style: str, **changes: Any) -> Callable[[], tuple[Any, Any]]:
    def build() -> tuple[Any, Any]:
        words = tokenizer(style)
        settings = dict(_TEXT, vocab_size=160, pad_token_id=words.pad_token_id, max_position_embeddings=LENGTH)
        config = getattr(transformers, f"{name}Config")(**(settings | changes))
        return getattr(transformers, f"{name}Model")(config), words

    return build


TEXT_TOWERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "BERT": _text("Bert", "bert"),
    "MPNet": _text("MPNet", "xlm-r", max_position_embeddings=LENGTH + 2),
    "XLM-R": _text("XLMRoberta", "xlm-r", max_position_embeddings=LENGTH + 2, type_vocab_size=1),
    "ModernBERT": _text("ModernBert", "bert", bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
                        local_attention=8),
    "NomicBert": _text("NomicBert", "bert"),
    "jina-embeddings-v3": _text("JinaEmbeddingsV3", "xlm-r", max_position_embeddings=LENGTH + 2, type_vocab_size=1),
}  # fmt: skip


def _image(name: str, processor: Callable[[], Any], **changes: Any) -> Callable[[], tuple[Any, Any]]:
    def build() -> tuple[Any, Any]:
        config = getattr(transformers, f"{name}Config")(**(_IMAGE | changes))
        return getattr(transformers, f"{name}Model")(config), processor()

    return build


IMAGE_TOWERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "ViT": _image("ViT", lambda: ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})),
    "DINOv2": _image("Dinov2", lambda: BitImageProcessorPil(**_CLIP_IMAGES), image_size=2 * SIDE),
    "DINOv3": _image(
        "DINOv3ViT", lambda: CLIPImageProcessorPil(**_CLIP_IMAGES), image_size=2 * SIDE, num_register_tokens=4
    ),
}


def save(kind: str, folder: Path) -> Any:
    """Save a family's model with its processor to a folder; return the model in eval mode."""
    torch.manual_seed(0)
    model, processor = {**DUAL_ENCODERS, **TEXT_TOWERS, **IMAGE_TOWERS}[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # large enough that differences show
            if not name.startswith("logit_"):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()
