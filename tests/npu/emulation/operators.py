"""CPU arithmetic of the operators whose documented meaning on the device is not the CPU's, and of torch_npu's own.

Every function gets CPU tensors over the device's memory and computes what the operator's documentation says, in float32
inside. Sources: Ascend/op-plugin docs/zh/custom_APIs/torch_npu, the page of each operator, unless another is named.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """F.gelu ignores `approximate` and is always the tanh form. Source: aclnnGelu; op-plugin GeluKernelNpuOpApi.cpp."""
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def gelu_out(x: Tensor, *, approximate: str = "none", out: Tensor) -> Tensor:
    """gelu, written to out."""
    return out.copy_(gelu(x))


def npu_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The form that is asked for. Source: aclnnGeluV2."""
    return F.gelu(x.float(), approximate=approximate).to(x.dtype)


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(normed, 1 / rms in float32)."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * rstd).to(x.dtype) * gamma.to(x.dtype), rstd


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, 1 / rms, sum): the sum comes third."""
    summed = x1 + x2
    return *npu_rms_norm(summed, gamma, epsilon), summed


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half."""
    first, second = x.float().chunk(2, dim=dim)
    return (F.silu(first) * second).to(x.dtype)


def npu_weight_quant_batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None, quant_offset: Tensor | None = None, bias: Tensor | None = None,
    antiquant_group_size: int = 0, inner_precise: int = 0, **others: Any,
) -> Tensor:  # fmt: skip
    """x @ (weight * scale) + bias in x.dtype: the weights are made wide before they are multiplied. weight: [K, N]."""
    given = (antiquant_offset, quant_scale, quant_offset, *others.values())
    if any(value is not None for value in given) or antiquant_group_size or inner_precise:
        raise NotImplementedError("npu_weight_quant_batchmatmul: only one scale a channel, and a bias, are emulated")
    wide = (weight.to(x.dtype) * antiquant_scale.reshape(1, -1)).float()
    y = x.float() @ wide
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def npu_rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """x * cos + rotate_half(x) * sin, not in place."""
    if rotary_mode != "half" or rotate is not None:
        raise NotImplementedError("npu_rotary_mul: only rotary_mode='half' without rotate is emulated")
    wide = x.float()
    return (wide * r1.float() + rotate_half(wide) * r2.float()).to(x.dtype).contiguous()


def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """Rotates query and key IN PLACE, although the schema does not say so. Source: aclnnApplyRotaryPosEmbV2."""
    for x in (query, key):
        x.copy_(x.float() * cos.float() + rotate_half(x.float()) * sin.float())
    return query, key


def npu_scatter_nd_update_(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """x[indices] = updates; an index outside x is not caught on the device, so the emulation is strict and raises."""
    x[tuple(indices.unbind(-1))] = updates
    return x


def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None, actual_seq_lengths_kv: Sequence[int] | None = None,
    num_heads: int = 1, scale: float = 1.0, pre_tokens: int = 2**31 - 1, next_tokens: int = 2**31 - 1,
    input_layout: str = "BSH", num_key_value_heads: int = 0, sparse_mode: int = 0, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * q k^T, masked) v; mask True = NOT attended; sparse_mode 3 is causal, anchored bottom-right.

    Without a mask, sparse_mode 0 attends to all. Rows past a length are unread.
    """
    defaults = {
        "inner_precise": 0,
        "block_size": 0,
        "antiquant_mode": 0,
        "key_antiquant_mode": 0,
        "value_antiquant_mode": 0,
    }
    if given := [name for name, v in others.items() if v not in (None, False) and v != defaults.get(name)]:
        raise NotImplementedError(f"npu_fused_infer_attention_score: {', '.join(given)} not emulated")
    if actual_seq_lengths is not None or input_layout not in ("BSH", "BSND", "BNSD", "BNSD_BSND"):
        raise NotImplementedError("npu_fused_infer_attention_score: TND and lengths of queries are not emulated")
    kv_heads = num_key_value_heads or num_heads
    q, k, v = (as_bnsd(x, input_layout, n) for x, n in ((query, num_heads), (key, kv_heads), (value, kv_heads)))
    lengths = list(actual_seq_lengths_kv or [k.shape[2]])
    rows = []
    for b in range(q.shape[0]):
        length = lengths[b if len(lengths) > 1 else 0]
        mask = None if atten_mask is None else masked_out(atten_mask, b, q.shape[2], length, sparse_mode)
        rows.append(attend(q[b], k[b, :, :length], v[b, :, :length], scale, mask))
    out = torch.stack(rows).to(query.dtype)  # [B, N, S, D]
    layout = input_layout.rpartition("_")[2]
    if layout != "BNSD":
        out = out.transpose(1, 2).reshape(query.shape if layout == "BSH" else (q.shape[0], q.shape[2], *q.shape[1::2]))
    return out.contiguous(), torch.zeros(1)


def as_bnsd(x: Tensor, layout: str, heads: int) -> Tensor:
    if layout.startswith("BNSD"):
        return x
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def masked_out(mask: Tensor, row: int, queries: int, keys: int, sparse_mode: int) -> Tensor | None:
    """Return [S, K], True where a position is not attended."""
    if sparse_mode in (2, 3):  # the compressed mask stands for a triangle of any size, of one query too
        offset = keys - queries if sparse_mode == 3 else 0
        return torch.ones(queries, keys, dtype=torch.bool).triu(1 + offset)
    if sparse_mode == 4:
        raise NotImplementedError("npu_fused_infer_attention_score: band masks are not emulated")
    full = mask.bool()
    if full.dim() == 4:
        full = full[row if full.shape[0] > 1 else 0, 0]
    elif full.dim() == 3:
        full = full[0]
    elif queries == 1:  # [B, T]
        full = full[row : row + 1]
    return full[:queries, :keys]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return [N, S, D]. q: [N, S, D]; k, v: [G, K, D]; query head n reads key/value head n // (N // G)."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.float().repeat_interleave(group, dim=0) for x in (k, v))
    scores = q.float() @ k.transpose(1, 2) * scale
    if mask is not None:
        scores = scores - 1e12 * mask  # so a row of nothing but masked keys is the mean of v, and no NaN
    return scores.softmax(-1) @ v


def npu_dtype_cast(x: Tensor, dtype: torch.dtype, input_dtype: torch.dtype | None = None) -> Tensor:
    return x.to(dtype)


def npu_format_cast(x: Tensor, acl_format: int, **options: Any) -> Tensor:
    """A private format keeps the values; memory order is the device's business. rules.py refuses parts of a memory."""
    return x.clone()


ARITHMETIC = {
    "aten::gelu": gelu,  # torch_npu 2.9 has its own; 2.13 calls gelu.out
    "aten::gelu.out": gelu_out,
    "npu::npu_gelu": npu_gelu,
    "npu::npu_rms_norm": npu_rms_norm,
    "npu::npu_add_rms_norm": npu_add_rms_norm,
    "npu::npu_swiglu": npu_swiglu,
    "npu::npu_weight_quant_batchmatmul": npu_weight_quant_batchmatmul,
    "npu::npu_rotary_mul": npu_rotary_mul,
    "npu::npu_apply_rotary_pos_emb": npu_apply_rotary_pos_emb,
    "npu::npu_scatter_nd_update_": npu_scatter_nd_update_,
    "npu::npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu::npu_dtype_cast": npu_dtype_cast,
    "npu::_npu_dtype_cast": npu_dtype_cast,
    "npu::npu_format_cast": npu_format_cast,
}
