"""Whether attention under a mask, which captured steps rest on, agrees with attention by lengths on this device."""

import math

import torch
from torch import Tensor

from covo_npu.kernels.interface import Kernels

# What the two may differ by, relative: a rounding of the weights and one of the result are 2^-8 each in bfloat16.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2**-6, torch.bfloat16: 2**-5}


def masked_attention_error(kernels: Kernels, q: Tensor, cache: Tensor, bound: int) -> float:
    """Return by how much the two attentions differ at most, at 1, half of the bound + 1 and bound - 1 rows.

    q: [B, H, D] and cache: [B, G, K_max, D], for shapes, dtype and device alone. Every part of the rows decides of one
    element of the result, the last valid row of as much as all before it, and a row that ought to be dropped of more
    than all that are valid: a tile that is left out, or read although it is masked, is an error near 1 or above.
    """
    num_slots, _, head_dim = q.shape
    num_kv_heads, max_length = cache.shape[1:3]
    scale = head_dim**-0.5
    rows = torch.arange(max_length, dtype=torch.int32, device=q.device)  # devices divide no int64
    part = rows[:, None] * head_dim // bound == torch.arange(head_dim, device=q.device)  # [K_max, D]
    of_head = torch.arange(1, num_kv_heads + 1, device=q.device)[:, None, None]
    v = (part * head_dim * of_head).to(q.dtype).expand(num_slots, -1, -1, -1).contiguous()
    worst = torch.zeros((), device=q.device)
    for first in range(3):
        chosen = [(1, bound // 2 + 1, bound - 1)[(first + slot) % 3] for slot in range(num_slots)]
        lengths = torch.tensor(chosen, dtype=torch.float32, device=q.device)[:, None]
        attended = rows < lengths
        weights = torch.where(
            attended, torch.where(rows == lengths - 1, lengths, 1.0), 50 * lengths
        ).log()  # [B, K_max]
        k = (weights * scale).to(q.dtype)[:, None, :, None].expand(cache.shape).contiguous()
        ones, mask = torch.ones_like(q), kernels.step_mask(attended)
        masked = kernels.masked_decode_attention(ones, k, v, mask, bound, scale).float()
        expected = kernels.decode_attention(ones, k, v, chosen, scale).float()
        worst = torch.maximum(worst, ((masked - expected).abs() / (1 + expected.abs())).max())
    error = worst.item()
    return error if math.isfinite(error) else math.inf
