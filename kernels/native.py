"""The contract of interface.py in fast plain PyTorch, for CPU and CUDA."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.kernels.interface import SNAKE_CONTEXT, DecodeLayers, Int8Dtypes, LayerWeights

name = "native"
int8_dtypes: Int8Dtypes = {dtype: (torch.float32, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

WIDENED_ROWS = 512  # of weights that the CPU makes wider at a time: what comes of them stays in the caches

ONEDNN = torch.ops.mkldnn
SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# 16-bit types that oneDNN does not multiply on this CPU; all in a build without oneDNN. PyTorch multiplies them with
# loops of its own, which took five to nine times as long as products of float32 on an AMD EPYC (Zen 3).
SLOW_DTYPES = tuple(
    dtype for dtype, asked in SUPPORTED.items() if not (hasattr(ONEDNN, asked) and getattr(ONEDNN, asked)())
)
# What oneDNN's fused product multiplies here.
FUSED_DTYPES = tuple(
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if hasattr(ONEDNN, "_linear_pointwise") and dtype not in SLOW_DTYPES
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """On the CPU bfloat16 goes straight to oneDNN, one row as a vector behind the weights.

    Asked directly, oneDNN adds the bias while it stores; PyTorch first writes it, then adds the rounded product. Before
    it multiplies, oneDNN copies the right factor into a layout of its own: of x @ weight.T that is the weights, which
    costs one row, as in decoding, more than the product; of weight @ x it is the row. float32 stays with PyTorch, whose
    sums are twice as exact, and so does float16. Of SLOW_DTYPES only one row is multiplied as it is.
    """
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    one_row = x.numel() == x.shape[-1]
    if x.dtype in SLOW_DTYPES and not one_row:
        return _widened_linear(x, weight, None, bias)
    if x.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    if one_row:
        row = x.reshape(-1)
        out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return out.view(*x.shape[:-1], -1)
    return _fused_linear(x, weight, bias) if _fuses(x) else F.linear(x, weight, bias)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weights become numbers of x's dtype, which is exact, while they are multiplied; on the CPU block by block.

    float16 is multiplied in float32: sums that lack their scale leave its range.
    """
    return _widened_linear(x, weight, scale, bias)


def _widened_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return (x @ weight.T) * scale + bias in x.dtype, the weights made wider for the call; on the CPU by blocks."""
    size_out = weight.shape[0]
    wide = x.float() if scale is not None and x.dtype == torch.float16 else _fast(x)
    block = WIDENED_ROWS if x.device.type == "cpu" else size_out
    out = x.new_empty(*x.shape[:-1], size_out)
    for start in range(0, size_out, block):
        rows = slice(start, start + block)
        y = linear(wide, weight[rows].to(wide.dtype)).float()
        y = y if scale is None else y * scale[rows].float()
        out[..., rows] = y if bias is None else y + bias[rows].float()
    return out


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which numbers of a dtype are multiplied: itself, but float32 on a CPU that is slow in it."""
    return torch.float32 if device.type == "cpu" and dtype in SLOW_DTYPES else dtype


def _fast(x: Tensor) -> Tensor:
    """Return x in its product_dtype."""
    return x.to(product_dtype(x.dtype, x.device))


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _fuses(x):
        return _fused_linear(x, weight, bias, "gelu", "tanh")
    return F.gelu(linear(x, weight, bias), approximate="tanh")


def _fuses(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in FUSED_DTYPES


def _fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", form: str = "") -> Tensor:
    """Return linear(x, weight, bias), or a function of it, in one pass over the result.

    oneDNN multiplies views by columns a thousand times slower, and reads a strided bias as contiguous.
    """
    x, weight = x.contiguous(), weight.contiguous()
    out: Tensor = ONEDNN._linear_pointwise(x, weight, None if bias is None else bias.contiguous(), then, [], form)
    return out


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


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _attention(q, k, v, None, scale)


def key_mask(attended: Tensor, num_queries: int) -> Tensor:
    """[1, K], for all queries: CUDA makes numbers of the mask's own elements in each layer."""
    return attended[None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return _attention(q, k, v, mask, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    dtype = q.dtype
    q, k, v = (_fast(x.transpose(1, 2)) for x in (q, k, v))  # [B, H, S, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).to(dtype).transpose(1, 2)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    head_dim = k.shape[-1]
    k_cache.view(-1, head_dim).index_copy_(0, rows, k.reshape(-1, head_dim))
    v_cache.view(-1, head_dim).index_copy_(0, rows, v.reshape(-1, head_dim))


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: int, length: int, scale: float) -> Tensor:
    num_queries, dtype = q.shape[0], q.dtype
    k, v = k_cache[slot : slot + 1, :, :length], v_cache[slot : slot + 1, :, :length]  # [1, G, K, D]
    q, k, v = map(_fast, (q, k, v))
    whole = num_queries == length  # PyTorch's is_causal is anchored top-left, so it serves only the square case
    mask = None if whole or num_queries == 1 else _causal_mask(num_queries, length, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).to(dtype)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float) -> Tensor:
    longest, attended = max(lengths), None
    if min(lengths) < longest:
        valid = torch.tensor(lengths, device=q.device)[:, None]
        attended = torch.arange(longest, device=q.device) < valid
    return _grouped_attention(q, k_cache, v_cache, attended, longest, scale)


def decode_layers(layers: Sequence[LayerWeights], eps: float, scale: float) -> DecodeLayers | None:
    return None


def step_mask(attended: Tensor) -> Tensor:
    return attended


def masked_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, bound: int, scale: float
) -> Tensor:
    return _grouped_attention(q, k_cache, v_cache, mask[:, :bound], bound, scale)


def conv_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU bfloat16 lies as conv1d wants it."""
    weight = weight.to(product_dtype(dtype, weight.device))
    return _channels_innermost(weight) if weight.dim() == 3 and _with_channels_innermost(weight) else weight


def _with_channels_innermost(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _channels_innermost(x: Tensor) -> Tensor:
    """Return x, [B, C, L], with its channels side by side in memory; itself if they are."""
    return x[:, :, None].contiguous(memory_format=torch.channels_last)[:, :, 0]


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
    """On the CPU bfloat16 with the channels innermost, as oneDNN wants it: up to four times as fast."""
    wide = product_dtype(weight.dtype, x.device)
    inputs, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if not _with_channels_innermost(weight):
        return F.conv1d(inputs, weight, bias, stride, padding, dilation, groups).to(x.dtype)
    inputs, weight = (_channels_innermost(t)[:, :, None] for t in (inputs, weight))
    out = F.conv2d(inputs, weight, bias, (1, stride), (0, padding), (1, dilation), groups)
    return out[:, :, 0].to(x.dtype)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int = 0) -> Tensor:
    return F.conv_transpose1d(x, weight, bias, stride, padding)


def anti_aliased_snake(
    x: Tensor,
    alpha: Tensor,
    inverse_beta: Tensor,
    up: tuple[float, ...],
    down: tuple[float, ...],
    starts: bool = True,
    ends: bool = True,
) -> Tensor:
    """Polyphase form: the doubled rate is two phases of the old one, each filter six multiply-adds of shifted slices.

    The even phase at t sees x[t - 3 .. t + 2] through the odd taps, the odd phase x[t - 2 .. t + 3] through the even
    taps; the result at t sees the even phase at t - 2 .. t + 3 and the odd one at t - 3 .. t + 2. So element i of both
    phases comes from x[i .. i + 5], and element i of the result from elements i .. i + 5 of both phases. Outside of the
    signal the doubled signal holds its first (even) and its last (odd) sample.
    """
    wide = with_edges(x.float(), starts, ends)
    column, inverse = alpha.float()[:, None], inverse_beta.float()[:, None]
    even, odd = (_weighted_slices(wide, [2 * tap for tap in up[first::-2]]) for first in (11, 10))
    for phase in (even, odd):
        phase.addcmul_(torch.sin(phase * column).square_(), inverse)
    hold_edges(even, odd, starts, ends)
    return _weighted_slices(odd, down[0::2], _weighted_slices(even, down[1::2])).to(x.dtype)


def with_edges(x: Tensor, starts: bool, ends: bool) -> Tensor:
    """Return x with SNAKE_CONTEXT copies of its edge values, on the sides where the signal has its edge.

    A concatenation is several times faster than replicate padding, and every device has it for every dtype.
    """
    left = [x[..., :1].expand(*x.shape[:-1], SNAKE_CONTEXT)] if starts else []
    right = [x[..., -1:].expand(*x.shape[:-1], SNAKE_CONTEXT)] if ends else []
    return torch.cat((*left, x, *right), dim=-1) if left or right else x


def hold_edges(even: Tensor, odd: Tensor, starts: bool, ends: bool) -> None:
    """Write over what the phases hold outside of the signal: its first even and its last odd sample."""
    if starts:
        odd[..., :3] = even[..., 2:3]
        even[..., :2] = even[..., 2:3]
    if ends:
        even[..., -3:] = odd[..., -3:-2]
        odd[..., -2:] = odd[..., -3:-2]


def _weighted_slices(x: Tensor, taps: Sequence[float], out: Tensor | None = None) -> Tensor:
    """Return the sum over j of taps[j] * x[..., j : j + L], L = N - len(taps) + 1, added to `out` if it is given.

    In the caches this is several times faster than a convolution of one channel, whatever the layout of that.
    """
    length = x.shape[-1] - len(taps) + 1
    slices = [(x[..., j : j + length], tap) for j, tap in enumerate(taps)]
    if out is None:
        first, tap = slices.pop(0)
        out = first * tap
    for part, tap in slices:
        out.add_(part, alpha=tap)
    return out


def _causal_mask(num_queries: int, length: int, device: torch.device) -> Tensor:
    return torch.ones(num_queries, length, dtype=torch.bool, device=device).tril(length - num_queries)
