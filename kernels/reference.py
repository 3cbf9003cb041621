"""The contract of interface.py in plain PyTorch with float32 inside: the oracle of all other backends.

Written to be read beside the docstrings of `Kernels`; nothing here is meant to be fast.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.kernels.interface import SNAKE_CONTEXT, DecodeLayers, Int8Dtypes, LayerWeights

name = "reference"
int8_dtypes: Int8Dtypes = {dtype: (torch.float32, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    y = (x.float() @ weight.float().T) * scale.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    wide = linear(x, weight, bias).float()
    return (wide * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.float() + bias.float()).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x.float() * cos.float() + rotated * sin.float()).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def gelu(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * 0.5 * (1 + torch.erf(wide / 2**0.5))).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * scale
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.float()).to(q.dtype)


def key_mask(attended: Tensor, num_queries: int) -> Tensor:
    return attended.expand(num_queries, -1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v.float()).to(q.dtype)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    head_dim = k.shape[-1]
    k_cache.view(-1, head_dim)[rows] = k.reshape(-1, head_dim)
    v_cache.view(-1, head_dim)[rows] = v.reshape(-1, head_dim)


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: int, length: int, scale: float) -> Tensor:
    num_queries, num_heads, _ = q.shape
    groups = num_heads // k_cache.shape[1]
    k = k_cache[slot, :, :length].float().repeat_interleave(groups, dim=0)  # [H, K, D]
    v = v_cache[slot, :, :length].float().repeat_interleave(groups, dim=0)
    scores = torch.einsum("shd,hkd->hsk", q.float(), k) * scale
    attended = torch.ones(num_queries, length, dtype=torch.bool, device=q.device).tril(length - num_queries)
    return torch.einsum("hsk,hkd->shd", scores.masked_fill(~attended, -torch.inf).softmax(-1), v).to(q.dtype)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float) -> Tensor:
    rows = [
        prefill_attention(q[slot : slot + 1], k_cache, v_cache, slot, length, scale)
        for slot, length in enumerate(lengths)
    ]
    return torch.cat(rows)


def decode_layers(layers: Sequence[LayerWeights], eps: float, scale: float) -> DecodeLayers | None:
    return None


def step_mask(attended: Tensor) -> Tensor:
    return attended


def masked_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, bound: int, scale: float
) -> Tensor:
    num_slots, num_heads, head_dim = q.shape
    grouped = q.float().view(num_slots, k_cache.shape[1], -1, head_dim)  # [B, G, H / G, D]
    scores = torch.einsum("bghd,bgkd->bghk", grouped, k_cache[:num_slots, :, :bound].float()) * scale
    weights = scores.masked_fill(~mask[:, None, None, :bound], -torch.inf).softmax(-1)
    out = torch.einsum("bghk,bgkd->bghd", weights, v_cache[:num_slots, :, :bound].float())
    return out.reshape(num_slots, num_heads, head_dim).to(q.dtype)


def conv_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight


def transformed_weight(weight: Tensor, stride: int, groups: int) -> Tensor | None:
    return None


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    transformed: Tensor | None = None,
) -> Tensor:
    wide = None if bias is None else bias.float()
    return F.conv1d(x.float(), weight.float(), wide, stride, padding, dilation, groups).to(x.dtype)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int = 0) -> Tensor:
    wide = None if bias is None else bias.float()
    return F.conv_transpose1d(x.float(), weight.float(), wide, stride, padding).to(x.dtype)


def anti_aliased_snake(
    x: Tensor,
    alpha: Tensor,
    inverse_beta: Tensor,
    up: tuple[float, ...],
    down: tuple[float, ...],
    starts: bool = True,
    ends: bool = True,
) -> Tensor:
    channels, length = x.shape[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    up_filter = x.new_tensor(up, dtype=wide).expand(channels, 1, -1)
    down_filter = x.new_tensor(down, dtype=wide).expand(channels, 1, -1)
    y = F.conv_transpose1d(F.pad(x.to(wide), (5, 5), "replicate"), up_filter, stride=2, groups=channels)
    y = 2 * y[..., 15:-15]
    y = y + torch.sin(alpha.to(wide)[:, None] * y).pow(2) * inverse_beta.to(wide)[:, None]
    y = F.conv1d(F.pad(y, (5, 6), "replicate"), down_filter, stride=2, groups=channels).to(x.dtype)
    return y[..., 0 if starts else SNAKE_CONTEXT : length if ends else length - SNAKE_CONTEXT]
