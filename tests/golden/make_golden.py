"""Make golden.json again: outputs of small towers by code that is not ours.

The image tower is timm's EVA02 of the design `eva02_base_patch16_clip_224` at small sizes; a larger image takes the
position embedding resized by EVA-CLIP's own rule (bicubic, not antialiased). The text tower is transformers' BERT with
its position table at zero, the ALiBi slopes of transformers' Bloom as an additive attention mask, and torch's own
functions for the gated feed-forward. Only the numbers enter the tests.

    pip install --no-deps timm
    python tests/golden/make_golden.py
"""

import enum
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import torch
from weights import LARGER, PROJECTION, TEXT, VISION, pixels, token_ids, weight


class _StubModule(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            modes = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
            return enum.Enum(name, {mode: mode.lower() for mode in modes})
        return type(name, (), {})


class _TorchvisionStub:
    """timm imports torchvision for its data transforms; its models do not use it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StubModule(spec.name)

    def exec_module(self, module):
        pass


def as_tensor(name: str, parameter: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(weight(name, tuple(parameter.shape))).to(parameter.dtype)


def image_tower(side: int) -> dict[str, list]:
    from timm.models.eva import Eva

    grid = VISION["image_size"] // VISION["patch_size"]
    model = Eva(
        img_size=side, patch_size=VISION["patch_size"], embed_dim=VISION["hidden_size"],
        depth=VISION["num_hidden_layers"], num_heads=VISION["num_attention_heads"], num_classes=PROJECTION,
        mlp_ratio=VISION["intermediate_size"] / VISION["hidden_size"], qkv_fused=False, swiglu_mlp=True,
        scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, global_pool="token",
        ref_feat_shape=(VISION["rope_reference_grid"],) * 2,
    ).double().eval()  # fmt: skip
    ours = {
        "cls_token": "vision_model.embeddings.class_token",
        "patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "norm1": "attention_norm", "norm2": "mlp_norm", "attn.norm": "attention.inner_norm",
        "attn.proj": "attention.out_proj", "attn": "attention", "mlp.fc1_g": "mlp.gate_proj",
        "mlp.fc1_x": "mlp.up_proj", "mlp.norm": "mlp.inner_norm", "mlp.fc2": "mlp.down_proj",
        "norm": "vision_model.norm", "head": "vision_projection",
    }  # fmt: skip

    def rename(name: str) -> str:
        head = ""
        if name.startswith("blocks."):
            _, layer, name = name.split(".", 2)
            head = f"vision_model.layers.{layer}."
        for theirs in sorted(ours, key=len, reverse=True):
            if name == theirs or name.startswith(theirs + "."):
                return head + ours[theirs] + name[len(theirs) :]
        raise KeyError(name)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pos_embed":
                trained = torch.from_numpy(
                    weight("vision_model.embeddings.position_embedding", (1, 1 + grid**2, VISION["hidden_size"]))
                )
                patches = trained[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
                size = side // VISION["patch_size"]
                patches = torch.nn.functional.interpolate(patches, size=(size, size), mode="bicubic")
                value = torch.cat([trained[:, :1], patches.permute(0, 2, 3, 1).reshape(1, size * size, -1)], dim=1)
            else:
                value = as_tensor(rename(name), parameter)
            parameter.copy_(value)
        images = torch.from_numpy(pixels(side))
        states = model.forward_features(images)
        return {"states": states.tolist(), "embedding": model.head(states[:, 0]).tolist()}


def text_tower() -> dict[str, list]:
    from transformers import BertConfig, BertModel
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    class GatedIntermediate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(2 * TEXT["intermediate_size"], TEXT["hidden_size"]))

        def forward(self, states):
            first, second = torch.split(states @ self.weight.T, TEXT["intermediate_size"], dim=-1)
            return 0.5 * first * (1.0 + torch.erf(first / 2.0**0.5)) * second

    sizes = {key: value for key, value in TEXT.items() if key != "hidden_dropout_prob"}
    model = BertModel(BertConfig(**sizes, attn_implementation="eager"), add_pooling_layer=False).double().eval()
    ours = {
        "embeddings.word_embeddings": "embeddings.word_embeddings",
        "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
        "embeddings.LayerNorm": "embeddings.norm",
        "attention.self.query": "attention.q_proj", "attention.self.key": "attention.k_proj",
        "attention.self.value": "attention.v_proj", "attention.output.dense": "attention.out_proj",
        "attention.output.LayerNorm": "attention_norm", "intermediate": "mlp.gate_up_proj",
        "output.dense": "mlp.down_proj", "output.LayerNorm": "mlp_norm",
    }  # fmt: skip
    ids, mask, token_types = (torch.from_numpy(array) for array in token_ids())
    length = ids.shape[1]
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate = GatedIntermediate().double()
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name:
                parameter.zero_()
                continue
            head, inner = "text_model.", name
            if name.startswith("encoder.layer."):
                _, _, layer, inner = name.split(".", 3)
                head = f"text_model.layers.{layer}."
            module, kind = inner.rsplit(".", 1)
            parameter.copy_(as_tensor(f"{head}{ours[module]}.{kind}", parameter))
        # Bloom's ALiBi of a mask of ones is slope * j; at position 1 it is the slope of each head.
        heads = TEXT["num_attention_heads"]
        slopes = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1].view(1, heads, 1, 1)
        distance = (torch.arange(length).view(-1, 1) - torch.arange(length).view(1, -1)).abs()
        bias = -slopes * distance + torch.where(mask[:, None, None, :] == 1, 0.0, -1e9)
        states = model(input_ids=ids, attention_mask=bias, token_type_ids=token_types).last_hidden_state
        pooled = torch.stack([row[: int(count)].mean(0) for row, count in zip(states, mask.sum(1), strict=True)])
    return {"states": states.tolist(), "embedding": pooled.tolist()}


def main() -> None:
    golden = {"text": text_tower()}
    sys.meta_path.insert(0, _TorchvisionStub())  # after transformers, which would take the stub for torchvision
    golden["image"] = image_tower(VISION["image_size"])
    golden["larger image"] = image_tower(LARGER)
    rounded = json.loads(json.dumps(golden), parse_float=lambda digits: round(float(digits), 9))
    path = Path(__file__).parent / "golden.json"
    path.write_text(json.dumps(rounded) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
