"""Small towers in the layouts in which weights are published, written independently of `bifocal.modeling`.

They compute what those models compute, with modules named as theirs, so that state dicts have the published names.
"""

import math

import torch
from torch import nn


class BertEmbeddings(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids)))


def alibi(length: int, heads: int) -> torch.Tensor:
    """(heads, length, length); heads must be a power of two here."""
    slopes = torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)])
    places = torch.arange(length)
    return -slopes[:, None, None] * (places[None, :] - places[:, None]).abs()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, bias=None) -> torch.Tensor:
    rows, length, width = q.shape
    q, k, v = (x.view(rows, length, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attention(self.query(x), self.key(x), self.value(x), self.heads, alibi(x.shape[1], self.heads))


class AttentionOutput(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)


class BertAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self = SelfAttention(width, heads)
        self.output = AttentionOutput(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output.LayerNorm(x + self.output.dense(self.self(x)))


class GatedLinear(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gated_layers = nn.Linear(width, 2 * inner, bias=False)
        self.wo = nn.Linear(inner, width)
        self.layernorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.gated_layers(x).chunk(2, dim=-1)
        return self.layernorm(x + self.wo(nn.functional.gelu(gate) * value))


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = BertAttention(width, heads)
        self.mlp = GatedLinear(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.attention(x))


class JinaBert(nn.Module):
    """JinaBERT v2 in BERT's layout."""

    def __init__(self, words: int = 96, width: int = 64, heads: int = 4, inner: int = 80, layers: int = 2) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(words, width)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(BertLayer(width, heads, inner) for _ in range(layers))
        self.pooler = nn.Module()
        self.pooler.dense = nn.Linear(width, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(ids)
        for layer in self.encoder.layer:
            x = layer(x)
        return x.mean(1)


class Mixer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.Wqkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        return self.out_proj(attention(q, k, v, self.heads, alibi(x.shape[1], self.heads)))


class FlashGatedLinear(nn.Module):
    """In either spelling; with `fc1` the second half is the gate."""

    def __init__(self, width: int, inner: int, spelling: str) -> None:
        super().__init__()
        first, second = ("gated_layers", "wo") if spelling == "gated_layers" else ("fc1", "fc2")
        self.add_module(first, nn.Linear(width, 2 * inner, bias=False))
        self.add_module(second, nn.Linear(inner, width))
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "gated_layers":
            gate, value = self.gated_layers(x).chunk(2, dim=-1)
            return self.wo(nn.functional.gelu(gate) * value)
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * nn.functional.gelu(gate))


class FlashLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, spelling: str) -> None:
        super().__init__()
        self.mixer = Mixer(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = FlashGatedLinear(width, inner, spelling)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.mixer(x))
        return self.norm2(x + self.mlp(x))


class FlashBert(nn.Module):
    """JinaBERT v2 in the flash layout."""

    def __init__(self, spelling: str, words=96, width=64, heads=4, inner=80, layers=2) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(words, width)
        self.embeddings.token_type_embeddings = nn.Embedding(2, width)
        self.emb_ln = nn.LayerNorm(width, eps=1e-12)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(FlashLayer(width, heads, inner, spelling) for _ in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        types = self.embeddings.token_type_embeddings(torch.zeros_like(ids))
        x = self.emb_ln(self.embeddings.word_embeddings(ids) + types)
        for layer in self.encoder.layers:
            x = layer(x)
        return x.mean(1)


def rotated(x: torch.Tensor, positions: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    """2D rotary embedding of (rows, heads, patches, d): interleaved pairs, first half by the row, second the column."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(0, half, 2) / half)
    angles = torch.cat([positions[:, :1] * frequencies, positions[:, 1:] * frequencies], dim=-1).repeat_interleave(
        2, -1
    )
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


class EvaAttention(nn.Module):
    def __init__(self, width: int, heads: int, timm: bool) -> None:
        super().__init__()
        self.heads, self.timm = heads, timm
        self.k_proj = nn.Linear(width, width, bias=False)
        self.q_proj, self.v_proj = (nn.Linear(width, width, bias=timm) for _ in range(2))
        if not timm:
            self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.add_module("norm" if timm else "inner_attn_ln", nn.LayerNorm(width, eps=1e-6))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.timm:
            q, v = q + self.q_bias, v + self.v_bias

        def turned(y: torch.Tensor) -> torch.Tensor:
            rows, length, width = y.shape
            y = y.view(rows, length, self.heads, width // self.heads).transpose(1, 2)
            y = torch.cat([y[:, :, :1], rotated(y[:, :, 1:], positions)], dim=2)
            return y.transpose(1, 2).reshape(rows, length, width)

        mixed = attention(turned(q), turned(k), v, self.heads)
        return self.proj((self.norm if self.timm else self.inner_attn_ln)(mixed))


class SwiGlu(nn.Module):
    def __init__(self, width: int, inner: int, timm: bool) -> None:
        super().__init__()
        self.names = ("fc1_g", "fc1_x", "norm", "fc2") if timm else ("w1", "w2", "ffn_ln", "w3")
        for name, module in zip(
            self.names,
            (nn.Linear(width, inner), nn.Linear(width, inner), nn.LayerNorm(inner, eps=1e-6), nn.Linear(inner, width)),
            strict=True,
        ):
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value, norm, out = (getattr(self, name) for name in self.names)
        return out(norm(nn.functional.silu(gate(x)) * value(x)))


class EvaBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, timm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = EvaAttention(width, heads, timm)
        self.mlp = SwiGlu(width, inner, timm)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), positions)
        return x + self.mlp(self.norm2(x))


class Eva(nn.Module):
    """EVA02 in EVA-CLIP's layout, with its rotary buffers, or in timm's."""

    def __init__(
        self, timm: bool = False, width=64, heads=2, inner=96, layers=2, patch=8, grid=4, head=64, reference: int = 16,
        stored: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, grid * grid + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(EvaBlock(width, heads, inner, timm) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if head:
            self.head = nn.Linear(width, head)
        self.grid, self.reference = grid, reference
        if not timm and stored:
            for module in (self, *(block.attn for block in self.blocks)):
                module.rope = nn.Module()
                # Interleaved pairs share an angle; the first half of the columns turns by the row.
                angles = torch.stack([self.axis()] * 2)[:, :, None] * 10_000.0 ** -(
                    torch.arange(0, width // heads // 2, 2) / (width // heads // 2)
                )
                angles = angles.repeat_interleave(2, dim=-1)
                by_row = angles[0][:, None].expand(grid, grid, -1)
                table = torch.cat([by_row, angles[1][None].expand(grid, grid, -1)], dim=-1).flatten(0, 1)
                module.rope.register_buffer("freqs_cos", table.cos())
                module.rope.register_buffer("freqs_sin", table.sin())

    def axis(self) -> torch.Tensor:
        return torch.arange(self.grid) / self.grid * self.reference

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        rows, columns = torch.meshgrid(self.axis(), self.axis(), indexing="ij")
        positions = torch.stack([rows.flatten(), columns.flatten()], dim=1)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)[:, 0]


class JinaClip(nn.Module):
    """jina-clip-v1's layout: the flash text tower under text_model.transformer, EVA02 with its head."""

    def __init__(self, spelling: str = "gated_layers") -> None:
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.transformer = FlashBert(spelling)
        self.vision_model = Eva(reference=4)
        self.logit_scale = nn.Parameter(torch.tensor(3.3))
