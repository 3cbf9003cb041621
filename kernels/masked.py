"""Whether attention under a mask, which captured work rests on, agrees with attention by lengths on this device."""

import math

import torch
from torch import Tensor

from covo_npu.kernels.interface import Kernels

# What the two may differ by, relative: a rounding of the weights and one of the result are 2^-8 each in bfloat16.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2**-6, torch.bfloat16: 2**-5}


def masked_attention_error(kernels: Kernels, q: Tensor, cache: Tensor, bound: int) -> float:
    """Return by how much the two attentions of a step differ at most, at 1, half of the bound + 1 and bound - 1 rows.

    q: [B, H, D] and cache: [B, G, K_max, D], for shapes, dtype and device alone. Every part of the rows decides of one
    element of the result, the last valid row of as much as all before it, and a row that ought to be dropped of more
    than all that are valid: a tile that is left out, or read although it is masked, is an error near 1 or above.
    """
    num_slots, _, head_dim = q.shape
    max_length, scale = cache.shape[2], head_dim**-0.5
    v = _values(max_length, bound, cache.shape[1], q).expand(num_slots, -1, -1, -1).contiguous()
    worst = torch.zeros((), device=q.device)
    for first in range(3):
        chosen = [_lengths(bound)[(first + slot) % 3] for slot in range(num_slots)]
        attended, keys = _attended(chosen, max_length, q)
        k = keys[:, None, :, None].expand(cache.shape).contiguous()
        ones, mask = torch.ones_like(q), kernels.step_mask(attended)
        masked = kernels.masked_decode_attention(ones, k, v, mask, bound, scale)
        worst = torch.maximum(worst, _difference(masked, kernels.decode_attention(ones, k, v, chosen, scale)))
    return _finite(worst)


def masked_keys_error(kernels: Kernels, q: Tensor) -> float:
    """Return by how much masked_attention differs at most from attention to the first 1, S / 2 + 1 and S - 1 keys.

    q: [B, S, H, D], for shapes, dtype and device alone; there are as many keys as queries. A fault is an error near 1
    or above, as in masked_attention_error.
    """
    batch, num_keys, num_heads, head_dim = q.shape
    ones, scale = torch.ones_like(q), head_dim**-0.5
    v = _values(num_keys, num_keys, num_heads, q).transpose(0, 1).expand(batch, -1, -1, -1).contiguous()
    worst = torch.zeros((), device=q.device)
    for length in _lengths(num_keys):
        attended, keys = _attended([length], num_keys, q)
        k = keys[:, :, None, None].expand(q.shape).contiguous()
        masked = kernels.masked_attention(ones, k, v, kernels.key_mask(attended[0], num_keys), scale)
        few, k, v_few = (x[:, :length].contiguous() for x in (ones, k, v))
        # All queries are one, so the first of them says what all have to see.
        worst = torch.maximum(worst, _difference(masked, kernels.attention(few, k, v_few, scale)[:, :1]))
    return _finite(worst)


def _lengths(bound: int) -> tuple[int, int, int]:
    return 1, bound // 2 + 1, bound - 1


def _values(num_rows: int, bound: int, num_heads: int, q: Tensor) -> Tensor:
    """Return values [H, K, D] like q: of each part of the first `bound` rows one element, the head's number times D."""
    head_dim = q.shape[-1]
    rows = torch.arange(num_rows, dtype=torch.int32, device=q.device)  # devices divide no int64
    part = rows[:, None] * head_dim // bound == torch.arange(head_dim, device=q.device)  # [K, D]
    of_head = torch.arange(1, num_heads + 1, device=q.device)[:, None, None]
    return (part * head_dim * of_head).to(q.dtype)


def _attended(lengths: list[int], num_rows: int, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows are valid, [B, K] bool, and the element that their keys repeat, [B, K] like q.

    Under queries of ones: the last valid row weighs as much as the length, those before it 1, invalid ones 50 lengths.
    """
    rows = torch.arange(num_rows, dtype=torch.int32, device=q.device)
    ends = torch.tensor(lengths, dtype=torch.float32, device=q.device)[:, None]
    attended = rows < ends
    weights = torch.where(attended, torch.where(rows == ends - 1, ends, 1.0), 50 * ends).log()
    return attended, (weights * q.shape[-1] ** -0.5).to(q.dtype)


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    found, expected = found.float(), expected.float()
    return ((found - expected).abs() / (1 + expected.abs())).max()


def _finite(worst: Tensor) -> float:
    error = worst.item()
    return error if math.isfinite(error) else math.inf
