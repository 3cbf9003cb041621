"""The contract of interface.py on Ascend NPUs: torch_npu's fused operators. The only file that imports torch_npu.

First arguments go by position, layouts and modes by name, so that one text serves torch_npu 2.9 (CANN 8.5) and 2.13.
Rules of the device that shape this file (sources: Ascend/op-plugin docs, the page of each operator; Ascend/pytorch
docs, native API tables; the pages of the aclnn operators):
- fused attention wants contiguous 16-bit tensors with head_dim a multiple of 16; float32 attention is plain math;
- its `scale` defaults to 1, and in its masks True means NOT attended;
- plain F.gelu is the tanh form whatever it is asked for;
- 1-D convolutions take float16 and float32, transposed ones float32 only, and no dimension may exceed 1,000,000;
- bfloat16 cannot be replicate-padded.
"""

import contextlib
import functools
import itertools
import logging
import os
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.kernels import native
from covo_npu.kernels.errors import BackendError, first_line
from covo_npu.kernels.interface import SNAKE_CONTEXT, DecodeLayers, Int8Dtypes, LayerWeights

try:
    with contextlib.redirect_stdout(sys.stderr):  # it prints its warnings where results belong
        import torch_npu
except (ImportError, OSError, RuntimeError) as error:  # not installed; no CANN; of another torch
    raise BackendError(
        f"device npu: torch_npu cannot be imported ({first_line(error)}). It needs three things: (1) CANN, "
        "toolkit and operators, made known to this shell by `source /usr/local/Ascend/cann/set_env.sh` (before CANN "
        "8.5 ascend-toolkit instead of cann); (2) a torch_npu that matches both: torch and torch_npu 2.9.0 for "
        f"CANN 8.5.0, 2.12.0 for CANN 9.1.0 (found torch {torch.__version__}); (3) the driver: "
        "`npu-smi info` must list the device. See docs/on-hardware.md"
    ) from error

name = "npu"
int8_dtypes: Int8Dtypes = {
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float16),
    torch.float32: (torch.float32, torch.float32),
}
log = logging.getLogger(__name__)

MAX_CONV_LENGTH = 1_000_000  # per dimension. Source: aclnnConvolution, limits
# The device's transposed 1-D convolution is made for one signal of at most so many channels and a result of more than
# so many samples. Source: isConvTransposed1dSwitchHW of aclnn_convolution.cpp, hicann/ops-nn 8.5.0
FAST_TRANSPOSED_CHANNELS, FAST_TRANSPOSED_LENGTH = 768, 4096
NZ = 29  # ACL_FORMAT_FRACTAL_NZ. Source: op-plugin docs, npu_format_cast
CONTEXT = 2 * SNAKE_CONTEXT  # samples that a block of the anti-aliased activation needs of the next one
BLOCK = 64  # samples of a block: a wider one multiplies more zeros, a narrower one computes more elements twice
PHASE = BLOCK + SNAKE_CONTEXT  # elements of one phase that the samples of a block depend on
MOST_INT8_CHANNELS = 65_535  # of one product with 8-bit weights. Source: op-plugin docs, npu_weight_quant_batchmatmul
COMPRESSED_MASK = 2048  # sparse_mode 3 wants one triangle of this size whatever the lengths


def open_device(index: int) -> torch.device:
    """Return npu:index, ready for use: chosen before any tensor, with the settings that our results rest on.

    Raises BackendError if the device is not there.
    """
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    count = torch_npu.npu.device_count()
    if index >= count:
        raise BackendError(
            f"device npu:{index} is not there: torch_npu {torch_npu.__version__} sees {count} NPUs "
            f"(ASCEND_RT_VISIBLE_DEVICES={'not set' if visible is None else visible}); see `npu-smi info`"
        )
    log.info("npu:%d of %d, torch_npu %s, ASCEND_RT_VISIBLE_DEVICES=%s", index, count, torch_npu.__version__, visible)
    torch_npu.npu.set_device(index)  # first of all: otherwise CANN opens a context on device 0 too
    torch_npu.npu.set_compile_mode(jit_compile=False)  # ready-made kernels: no compilation at run time
    torch_npu.npu.conv.allow_hf32 = False  # True by default; we promise float32 where the tensors are float32
    torch_npu.npu.matmul.allow_hf32 = False
    torch_npu.npu.config.allow_internal_format = False  # True sends convolutions through the old compiled operators
    return torch.device("npu", index)


def cast_weights_nz(module: torch.nn.Module) -> int:
    """Cast the 2-D 16-bit weights of a module to FRACTAL_NZ in place and return their number. Call it after loading.

    Only matmuls of 2-D operands read NZ weights fast, and copying into one loses the format. The permission stands only
    during the casts, because it reroutes convolutions. Values stay; results may differ in rounding.
    """
    weights = [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.dim() == 2 and parameter.dtype in (torch.float16, torch.bfloat16) and "embed" not in name
    ]
    torch_npu.npu.config.allow_internal_format = True
    try:
        for weight in weights:
            weight.data = torch_npu.npu_format_cast(weight.data, NZ)
    finally:
        torch_npu.npu.config.allow_internal_format = False
    return len(weights)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Two dimensions: one launch with the bias in it, and the only form that reads NZ weights fast."""
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """One launch, the weights as they lie: their transposed view is what the operator reads fastest.

    It takes the scale in x.dtype: in bfloat16 a channel is off by 0.4 % at most, like one rounding of its results. More
    channels than it takes, those of the head, are multiplied in equal parts and joined. float32, which it does not
    multiply, is made of PyTorch's operators.
    """
    if x.dtype == torch.float32:
        return native.linear_int8(x, weight, scale, bias)
    channels = weight.shape[0]
    if (count := -(-channels // MOST_INT8_CHANNELS)) > 1:
        size = -(-channels // count)
        biases = itertools.repeat(None) if bias is None else bias.split(size)
        parts = zip(weight.split(size), scale.split(size), biases)
        return torch.cat([linear_int8(x, *part) for part in parts], dim=-1)
    scale_dtype, bias_dtype = int8_dtypes[x.dtype]
    y: Tensor = torch_npu.npu_weight_quant_batchmatmul(
        x.reshape(-1, x.shape[-1]), weight.t(), scale.to(scale_dtype),
        bias=None if bias is None else bias.to(bias_dtype),
    )  # fmt: skip
    return y.view(*x.shape[:-1], channels)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed: Tensor = torch_npu.npu_rms_norm(x, weight, eps)[0]
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, summed = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
    return normed, summed


layer_norm = native.layer_norm


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """npu_rotary_mul does not write x, unlike npu_apply_rotary_pos_emb, and takes head_dim 64 and 128 on every CANN."""
    rotated: Tensor = torch_npu.npu_rotary_mul(x, cos, sin, rotary_mode="half")
    return rotated


def swiglu(gate_up: Tensor) -> Tensor:
    gated: Tensor = torch_npu.npu_swiglu(gate_up, dim=-1)
    return gated


def gelu(x: Tensor) -> Tensor:
    out: Tensor = torch_npu.npu_gelu(x, approximate="none")
    return out


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch_npu.npu_gelu(linear(x, weight, bias), approximate="tanh")
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _full_attention(q, k, v, scale, None)


def key_mask(attended: Tensor, num_queries: int) -> Tensor:
    """[S, K], True where NOT attended: of the documented forms the one without a batch, which BSND takes."""
    return attended.logical_not().expand(num_queries, -1).contiguous()


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """No lengths, which a graph would bake in."""
    return _full_attention(q, k, v, scale, mask)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    head_dim = k.shape[-1]
    for new, cache in ((k, k_cache), (v, v_cache)):
        torch_npu.npu_scatter_nd_update_(cache.view(-1, head_dim), rows[:, None], new.reshape(-1, head_dim))


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: int, length: int, scale: float) -> Tensor:
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    k, v = k_cache[slot : slot + 1], v_cache[slot : slot + 1]  # [1, G, K_max, D]: contiguous, unlike its valid part
    if q.dtype == torch.float32:
        grouped = q.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [G, H / G, S, D]
        mask = _future(num_queries, length, q.device) if num_queries > 1 else None
        k, v = (cache[0, :, None, :length] for cache in (k, v))  # [G, 1, K, D]: every head of a group reads it
        return (
            _plain_attention(grouped, k, v, scale, mask).permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
        )
    causal = {"atten_mask": _compressed_mask(q.device), "sparse_mode": 3} if num_queries > 1 else {}
    layout = "BNSD_BSND" if num_queries > 1 else "BNSD"  # the output in the order of [S, H, D]
    out = _fused_attention(
        q.transpose(0, 1)[None], k, v, layout, scale,
        num_heads=num_heads, num_key_value_heads=num_kv_heads, actual_seq_lengths_kv=[length], **causal,
    )  # fmt: skip
    return out.view(num_queries, num_heads, head_dim)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], scale: float) -> Tensor:
    num_slots, num_heads, head_dim = q.shape
    if q.dtype == torch.float32:
        rows = [
            prefill_attention(q[slot : slot + 1], k_cache, v_cache, slot, length, scale)
            for slot, length in enumerate(lengths)
        ]
        return torch.cat(rows) if num_slots > 1 else rows[0]
    out = _fused_attention(
        q[:, :, None], k_cache[:num_slots], v_cache[:num_slots], "BNSD", scale,
        num_heads=num_heads, num_key_value_heads=k_cache.shape[1], actual_seq_lengths_kv=lengths,
    )  # fmt: skip
    return out.view(num_slots, num_heads, head_dim)


def decode_layers(layers: Sequence[LayerWeights], eps: float, scale: float) -> DecodeLayers | None:
    """None: a whole step is captured as a graph instead."""
    return None


def step_mask(attended: Tensor) -> Tensor:
    """[B, 1, 1, K_max], True where NOT attended."""
    return attended.logical_not()[:, None, None]


def masked_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, bound: int, scale: float
) -> Tensor:
    """The lengths that a graph would bake in are all `bound`; the mask, a tensor, does the rest."""
    num_slots, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    k, v = k_cache[:num_slots], v_cache[:num_slots]
    if q.dtype == torch.float32:
        grouped = q.view(num_slots, num_kv_heads, -1, head_dim)  # [B, G, H / G, D]
        out = _plain_attention(grouped, k[:, :, :bound], v[:, :, :bound], scale, mask[..., :bound])
        return out.reshape(num_slots, num_heads, head_dim)
    out = _fused_attention(
        q[:, :, None], k, v, "BNSD", scale, num_heads=num_heads, num_key_value_heads=num_kv_heads,
        actual_seq_lengths_kv=[bound] * num_slots, atten_mask=mask,
    )  # fmt: skip
    return out.view(num_slots, num_heads, head_dim)


def conv_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """For bfloat16 float32: the device's convolutions are documented for float16 and float32."""
    return weight.to(torch.float32 if dtype == torch.bfloat16 else dtype)


def transformed_weight(weight: Tensor, stride: int, groups: int) -> Tensor | None:
    """None: the device's convolutions take the weight alone."""
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
    """Computed as conv_weight says, whether it was asked before or not."""
    _check_length(x)
    weight = conv_weight(weight, weight.dtype)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.conv1d(x.to(weight.dtype), weight, bias, stride, padding, dilation, groups).to(x.dtype)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int = 0) -> Tensor:
    """16-bit types are computed in float32, the only dtype of the device's transposed convolution.

    As products where the device's convolution has no fast way and the kernel is a multiple of the stride.
    """
    _check_length(x)
    wide_bias = None if bias is None else bias.float()
    in_products = weight.shape[-1] % stride == 0 and transposes_slowly(x, weight, stride, padding)
    compute = _transposed_as_products if in_products else F.conv_transpose1d
    return compute(x.float(), weight.float(), wide_bias, stride, padding).to(x.dtype)


def anti_aliased_snake(
    x: Tensor,
    alpha: Tensor,
    inverse_beta: Tensor,
    up: tuple[float, ...],
    down: tuple[float, ...],
    starts: bool = True,
    ends: bool = True,
) -> Tensor:
    """The polyphase form of native.anti_aliased_snake in float32, as products of blocks with banded matrices.

    A convolution of one or two channels would be padded to eight (NC1HWC0, C0 = 8 in float32). Here the signal is cut
    into rows of BLOCK samples; a block of both phases needs its row and the CONTEXT samples after it. Source of the
    padding: aclnnConvolution, op_api of hicann/ops-nn 8.5.0; what it costs is counted in tests/npu/test_vocoder.py.
    """
    batch, channels, _ = x.shape
    blocks = _blocks(x.float(), starts, ends)  # [B, C, n + 1, BLOCK], the last one filling
    rows = blocks.view(-1, BLOCK)
    whole, after, back = _bands(up, down, x.device)
    y = rows.new_empty(len(rows), 2 * PHASE)  # the last row, with nothing after it, stays as it is: it is filling
    torch.mm(rows[1:, :CONTEXT], after, out=y[:-1]).addmm_(rows[:-1], whole)
    y = y.view(batch, channels, -1)
    y = torch.addcmul(y, torch.sin(y * alpha.float()[:, None]).square_(), inverse_beta.float()[:, None])
    length = x.shape[-1] + (CONTEXT // 2) * (starts + ends) - CONTEXT
    _hold_edges(y.view(batch, channels, -1, 2, PHASE), length, starts, ends)
    return torch.mm(y.view(-1, 2 * PHASE), back).view(batch, channels, -1)[..., :length].to(x.dtype)


def transposes_slowly(x: Tensor, weight: Tensor, stride: int, padding: int = 0) -> bool:
    """Return whether the device's own transposed convolution has no fast way for these shapes."""
    batch, channels, length = x.shape
    out_length = (length - 1) * stride - 2 * padding + weight.shape[-1]
    return batch > 1 or channels > FAST_TRANSPOSED_CHANNELS or out_length <= FAST_TRANSPOSED_LENGTH


def _transposed_as_products(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Return F.conv_transpose1d of a kernel of n strides: one product in n parts, part m of it m inputs later."""
    batch, channels, length = x.shape
    out_channels, parts = weight.shape[1], weight.shape[2] // stride
    y = torch.mm(x.transpose(1, 2).reshape(-1, channels), weight.reshape(channels, -1))
    y = y.view(batch, length, out_channels, parts, stride)
    out = F.pad(y[:, :, :, 0], (0, 0, 0, 0, 0, parts - 1))  # [B, L + n - 1, C_out, stride]
    for m in range(1, parts):
        out[:, m : m + length] += y[:, :, :, m]
    out = out.permute(0, 2, 1, 3).reshape(batch, out_channels, -1)
    out = out[..., padding : out.shape[-1] - padding]
    return out if bias is None else out + bias[:, None]


def _full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return [B, S, H, D]. q: [B, S, H, D]; k, v: [B, K, H, D]; mask: [S, K], True where NOT attended, or None."""
    num_heads = q.shape[2]
    if q.dtype == torch.float32:
        return _plain_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, mask).transpose(1, 2)
    masked = {} if mask is None else {"atten_mask": mask}
    return _fused_attention(q, k, v, "BSND", scale, num_heads=num_heads, num_key_value_heads=num_heads, **masked)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, **options: object) -> Tensor:
    """Return FIA's attention in the output order of `layout`. Copies what is not contiguous. q, k, v: 16-bit."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out: Tensor = torch_npu.npu_fused_infer_attention_score(q, k, v, input_layout=layout, scale=scale, **options)[0]
    return out


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return [..., S, D] in float32. q: [..., S, D]; k, v: [..., K, D]; mask: [S, K], True where NOT attended."""
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if mask is not None:
        scores.masked_fill_(mask, -torch.inf)
    return torch.matmul(scores.softmax(-1), v)


def _future(num_queries: int, length: int, device: torch.device) -> Tensor:
    """Return [S, K], True where a key comes after the query. The last query sees all keys."""
    return torch.ones(num_queries, length, dtype=torch.bool, device=device).triu(1 + length - num_queries)


@functools.cache
def _compressed_mask(device: torch.device) -> Tensor:
    return torch.ones(COMPRESSED_MASK, COMPRESSED_MASK, dtype=torch.bool).triu(1).to(device)


def _blocks(x: Tensor, starts: bool, ends: bool) -> Tensor:
    """Return [B, C, n + 1, BLOCK]: native.with_edges, then the last sample again as often as it takes."""
    half = CONTEXT // 2
    length = x.shape[-1] + half * (starts + ends)
    filling = (-(-(length - CONTEXT) // BLOCK) + 1) * BLOCK - length + half * ends
    left = [x[..., :1].expand(-1, -1, half)] if starts else []
    return torch.cat((*left, x, x[..., -1:].expand(-1, -1, filling)), dim=-1).unflatten(-1, (-1, BLOCK))


def _hold_edges(y: Tensor, length: int, starts: bool, ends: bool) -> None:
    """native.hold_edges on blocks of phases, [B, C, n, 2, PHASE]; neighbours overlap by CONTEXT / 2 elements."""
    half = CONTEXT // 2
    if starts:
        y[:, :, 0, :, :3] = y[:, :, 0, :1, 2:3].clone()
    if ends:
        last = length + half - 3  # from here on the odd phase is held, and the even one too
        for block in range(max(0, last - PHASE + 1 + BLOCK - 1) // BLOCK, (length - 1) // BLOCK + 1):
            at = last - block * BLOCK
            y[:, :, block, :, at:] = y[:, :, block, 1:, at : at + 1].clone()


@functools.cache
def _bands(up: tuple[float, ...], down: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the filters as banded matrices: up [BLOCK, 2 PHASE] and [CONTEXT, 2 PHASE], down [2 PHASE, BLOCK].

    Element i of a phase is the sum over j of tap j * sample i + j, up with the gain of zero stuffing; sample i of the
    result that over both phases of tap j * element i + j. See native.anti_aliased_snake.
    """
    forth, back = torch.zeros(BLOCK + CONTEXT, 2, PHASE), torch.zeros(2, PHASE, BLOCK)
    for phase, (taps_up, taps_down) in enumerate(((up[11::-2], down[1::2]), (up[10::-2], down[0::2]))):
        for j, (rise, fall) in enumerate(zip(taps_up, taps_down, strict=True)):
            forth[:, phase].diagonal(-j)[:PHASE] = 2 * rise
            back[phase].diagonal(-j)[:BLOCK] = fall
    forth = forth.view(BLOCK + CONTEXT, -1)
    return forth[:BLOCK].to(device), forth[BLOCK:].to(device), back.view(-1, BLOCK).to(device)


def _check_length(x: Tensor, rows: int = 1) -> None:
    longest = max(rows, *x.shape)
    if longest > MAX_CONV_LENGTH:
        raise BackendError(
            f"a convolution on npu takes at most {MAX_CONV_LENGTH} along a dimension, found {list(x.shape)}; "
            "compute the waveform in pieces"
        )
