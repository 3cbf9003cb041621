"""The contract of interface.py in fast plain PyTorch, for CPU and CUDA."""

import torch
import torch.nn.functional as F
from torch import Tensor

name = "native"

linear = F.linear
conv1d = F.conv1d


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, S, D]
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    head_dim = k.shape[-1]
    k_cache.view(-1, head_dim).index_copy_(0, rows, k.reshape(-1, head_dim))
    v_cache.view(-1, head_dim).index_copy_(0, rows, v.reshape(-1, head_dim))


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: int, length: int, scale: float) -> Tensor:
    num_queries = q.shape[0]
    k, v = k_cache[slot : slot + 1, :, :length], v_cache[slot : slot + 1, :, :length]  # [1, G, K, D]
    whole = num_queries == length  # PyTorch's is_causal is anchored top-left, so it serves only the square case
    mask = None if whole else _causal_mask(num_queries, length, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float) -> Tensor:
    longest, attended = max(lengths), None
    if min(lengths) < longest:
        valid = torch.tensor(lengths, device=q.device)[:, None]
        attended = torch.arange(longest, device=q.device) < valid
    return _grouped_attention(q, k_cache, v_cache, attended, longest, scale)


def masked_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, attended: Tensor, bound: int, scale: float
) -> Tensor:
    return _grouped_attention(q, k_cache, v_cache, attended[:, :bound], bound, scale)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int = 0) -> Tensor:
    return F.conv_transpose1d(x, weight, bias, stride, padding)


def anti_aliased_snake(
    x: Tensor, alpha: Tensor, inverse_beta: Tensor, up: tuple[float, ...], down: tuple[float, ...]
) -> Tensor:
    """Polyphase form: channels fold into the batch, the doubled rate is two phases of the old one.

    With xp = x padded by 3, the samples at 2t and 2t + 1 of the upsampled signal are two 7-tap filters on xp[t : t + 7];
    the downsampled signal is one 7-tap filter on the two phases. Outside the signal both phases hold the edge sample of
    the doubled signal: the first even one on the left, the last odd one on the right.
    """
    batch, channels, length = x.shape
    up_phases, down_phases = polyphase(up, down, x.dtype, x.device)
    rows = F.pad(x, (3, 3), "replicate").view(batch * channels, 1, length + 6)
    y = F.conv1d(rows, up_phases).view(batch, channels, 2, length)
    y = y + torch.sin(y * alpha[:, None, None]).square_() * inverse_beta[:, None, None]
    left = y[:, :, :1, :1].expand(-1, -1, 2, 3)
    right = y[:, :, 1:, -1:].expand(-1, -1, 2, 3)
    y = torch.cat((left, y, right), dim=-1).view(batch * channels, 2, length + 6)
    return F.conv1d(y, down_phases).view(batch, channels, length)


def polyphase(
    up: tuple[float, ...], down: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the phases of the 12-tap filters: up [2, 1, 7], with the gain of 2 of zero stuffing, and down [1, 2, 7].

    Even outputs see x[t - 3 .. t + 2] through the odd taps, odd outputs see x[t - 2 .. t + 3] through the even taps.
    """
    up_phases = [[*(2 * tap for tap in up[11::-2]), 0.0], [0.0, *(2 * tap for tap in up[10::-2])]]
    down_phases = [[0.0, *down[1::2]], [*down[0::2], 0.0]]
    options = {"dtype": dtype, "device": device}
    return torch.tensor(up_phases, **options)[:, None], torch.tensor(down_phases, **options)[None]


def _grouped_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, attended: Tensor | None, length: int, scale: float
) -> Tensor:
    """Return attention of one token a slot over the first `length` rows: [B, H, D]. attended: [B, length] bool."""
    num_slots, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    k, v = k_cache[:num_slots, :, :length], v_cache[:num_slots, :, :length]
    mask = None if attended is None else attended[:, None, None]
    # The query heads of one kv head stand where a sequence of queries would: no copy of k and v.
    grouped = q.view(num_slots, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.reshape(num_slots, num_heads, head_dim)


def _causal_mask(num_queries: int, length: int, device: torch.device) -> Tensor:
    return torch.ones(num_queries, length, dtype=torch.bool, device=device).tril(length - num_queries)
