"""The contract of interface.py on CUDA: PyTorch's functions, and a Triton kernel for 8-bit weights times few rows.

Triton comes with PyTorch's CUDA builds. Without it `native` serves, which makes the weights wider in every call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from covo_npu.kernels import native
from covo_npu.kernels.interface import Int8Dtypes

name = "cuda"
int8_dtypes: Int8Dtypes = native.int8_dtypes

linear = native.linear
linear_gelu_tanh = native.linear_gelu_tanh
rms_norm = native.rms_norm
add_rms_norm = native.add_rms_norm
layer_norm = native.layer_norm
rotary = native.rotary
swiglu = native.swiglu
gelu = native.gelu
attention = native.attention
key_mask = native.key_mask
masked_attention = native.masked_attention
write_kv = native.write_kv
prefill_attention = native.prefill_attention
decode_attention = native.decode_attention
decode_layers = native.decode_layers
step_mask = native.step_mask
masked_decode_attention = native.masked_decode_attention
conv_weight = native.conv_weight
transformed_weight = native.transformed_weight
conv1d = native.conv1d
conv_transpose1d = native.conv_transpose1d
anti_aliased_snake = native.anti_aliased_snake

ROWS = 16  # the least that tensor cores multiply; fewer cost as much, for the weights are what is waited for
# Weights of a program and of a turn of its loop. 16 channels make 224 programs of the narrowest product of the
# published model, more than a card has multiprocessors; each has STAGES blocks of 4 KiB on their way.
BLOCK_N, BLOCK_K, STAGES, WARPS = 16, 256, 4, 4


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Up to ROWS rows: the weights are read once, as they lie. A row's bits do not depend on how many there are."""
    size_out, size_in = weight.shape
    rows = x.reshape(-1, size_in)
    if not 0 < len(rows) <= ROWS or not weight.is_contiguous():
        return native.linear_int8(x, weight, scale, bias)
    out = x.new_empty(*x.shape[:-1], size_out)
    grid = (triton.cdiv(size_out, BLOCK_N),)
    with torch.cuda.device_of(x):  # a thread's own device may be another
        _product[grid](
            rows.contiguous(),
            weight,
            scale.contiguous(),
            scale if bias is None else bias.contiguous(),
            out,
            len(rows),
            size_out,
            size_in,
            bias is not None,
            ROWS,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            num_warps=WARPS,
        )
    return out


# A step of one sequence and one of eight are one program.
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]  # Triton compiles annotations, too
    x,
    weight,
    scale,
    bias,
    out,
    num_rows,
    size_out,
    size_in,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write out[:, block] of linear_int8; one program a block of BLOCK_N channels. All tensors are contiguous.

    An int8 number is exact in every floating dtype, so the products are those of the contract; "ieee" keeps float32's
    from being rounded to TF32.
    """
    rows, inner = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here, there = rows[:, None] < num_rows, channels[None, :] < size_out
    inputs = x + rows[:, None] * size_in + inner[None, :]
    weights = weight + channels[None, :].to(tl.int64) * size_in + inner[:, None]
    sums = tl.full((ROWS, BLOCK_N), 0.0, tl.float32)
    for start in tl.range(0, size_in, BLOCK_K, num_stages=STAGES):
        left = size_in - start
        numbers = tl.load(weights + start, mask=there & (inner[:, None] < left), other=0)
        values = tl.load(inputs + start, mask=here & (inner[None, :] < left), other=0.0)
        sums = tl.dot(values, numbers.to(values.dtype), sums, input_precision="ieee")
    y = sums * tl.load(scale + channels, mask=channels < size_out, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + channels, mask=channels < size_out, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * size_out + channels[None, :], y.to(out.dtype.element_ty), mask=here & there)
