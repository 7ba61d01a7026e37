"""Networks with attention, and others that work on tokens, as users write them."""

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, HEAD = 32, 4, 8
VOCABULARY = 50


class FusedAttention(nn.Module):
    """Queries, keys and values in one layer, as in timm."""

    def __init__(self, dim=WIDTH, num_heads=HEADS):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, -1))


class MLP(nn.Module):
    def __init__(self, inputs, hidden, outputs=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs or inputs)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), FusedAttention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), MLP(WIDTH, 64)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.1)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.1)
        self.blocks = nn.Sequential(EncoderBlock(), EncoderBlock())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class RMSNorm(nn.Module):
    """One of the user's own."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(x, cos, sin):
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], -1) * sin


class CausalAttention(nn.Module):
    """Separate layers, grouped queries, rotary positions, and a mask."""

    def __init__(self, heads=HEADS, shared=2):
        super().__init__()
        self.heads, self.shared, self.head_dim = heads, shared, HEAD
        self.q_proj = nn.Linear(WIDTH, heads * HEAD, bias=False)
        self.k_proj = nn.Linear(WIDTH, shared * HEAD, bias=False)
        self.v_proj = nn.Linear(WIDTH, shared * HEAD, bias=False)
        self.o_proj = nn.Linear(heads * HEAD, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.repeat_interleave(self.heads // self.shared, dim=1)
        v = v.repeat_interleave(self.heads // self.shared, dim=1)
        scores = (q @ k.transpose(-2, -1)) / self.head_dim**0.5
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.o_proj((scores @ v).transpose(1, 2).reshape(B, T, -1))


class GatedMLP(nn.Module):
    def __init__(self, hidden=48):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attention = RMSNorm(WIDTH), CausalAttention()
        self.norm2, self.mlp = RMSNorm(WIDTH), GatedMLP()

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([DecoderBlock(), DecoderBlock()])
        self.norm = RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        angles = torch.arange(16)[:, None] / 100.0 ** (torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin(), persistent=False)

    def forward(self, tokens):
        x, length = self.embed(tokens), tokens.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return self.lm_head(self.norm(x))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def split(self, x):
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)

    def forward(self, x, memory):
        q, k, v = self.split(self.query(x)), self.split(self.key(memory)), self.split(self.value(memory))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = EncoderBlock()
        self.norm, self.cross = nn.LayerNorm(WIDTH), CrossAttention()
        self.mlp_norm, self.mlp = nn.LayerNorm(WIDTH), MLP(WIDTH, 64)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source, target):
        memory, x = self.encoder(self.source(source)), self.target(target)
        x = x + self.cross(self.norm(x), memory)
        return self.head(x + self.mlp(self.mlp_norm(x)))


class TorchEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class TorchTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 64, batch_first=True)
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, source, target):
        return self.head(self.transformer(self.source(source), self.target(target)))


class MixerBlock(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(WIDTH), MLP(tokens, 24)
        self.norm2, self.channels = nn.LayerNorm(WIDTH), MLP(WIDTH, 64)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16), MixerBlock(16))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class PatchMerging(nn.Module):
    """Four neighbours become one position with four times the channels, as in Swin."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Merging(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, 2)
        self.mlp1, self.merge1 = MLP(16, 32), PatchMerging(16)
        self.mlp2, self.merge2 = MLP(32, 48), PatchMerging(32)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        x = self.merge1(x + self.mlp1(x))
        return self.head(self.merge2(x + self.mlp2(x)).mean((1, 2)))


class Experts(nn.Module):
    """Experts in stacked parameters, each weighed by a router."""

    def __init__(self, experts=3, hidden=24):
        super().__init__()
        self.embed, self.router = nn.Linear(8, 16), nn.Linear(16, experts)
        self.w1 = nn.Parameter(torch.randn(experts, 16, hidden) / 4)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, 16) / 5)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x)
        hidden = torch.einsum("bd,edh->beh", x, self.w1).relu()
        out = torch.einsum("beh,ehd->bed", hidden, self.w2)
        return self.head(x + (self.router(x).sigmoid()[..., None] * out).sum(1))


class Adapted(nn.Module):
    """A linear layer with a low-rank update of its own, as LoRA writes it."""

    def __init__(self, inputs, outputs, rank=4):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))


class LowRankAdapters(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = Adapted(16, 32), Adapted(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


class AttentionPooling(nn.Module):
    """A learned query looks at all positions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())
        self.query = nn.Parameter(torch.randn(24) / 5)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.body(x)
        weights = (x @ self.query).softmax(1)
        return self.head((weights[..., None] * x).sum(1))
