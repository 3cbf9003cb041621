"""What an Ascend NPU refuses, as a table: one row a documented limit, each with its source.

Sources: "native API" = Ascend/pytorch docs/zh/api/native_api (columns A2 and A3); "op-plugin docs, X" =
Ascend/op-plugin docs/zh/custom_APIs/torch_npu, page X; "aclnnX" = the page of that CANN operator (hicann/ops-nn, branch
8.5.0). Rows are documented statements; nothing here was measured on hardware.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

MAX_CONV_DIM = 1_000_000
HALF = (torch.float16, torch.bfloat16)
CONV_DTYPES = (torch.float16, torch.float32)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def leaves(x: Any) -> list[Any]:
    """Return what an argument or a result is made of: itself, or what its lists and tuples hold.

    PyTorch's pytree, which knows more kinds, took a tenth of the time of all tests.
    """
    return [leaf for y in x for leaf in leaves(y)] if isinstance(x, list | tuple) else [x]


@dataclass(frozen=True)
class Call:
    """One call of an operator with its arguments by name. call.x is argument x."""

    operator: str
    arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def packet(self) -> str:
        """The operator without its overload."""
        return self.operator.partition(".")[0]

    @cached_property
    def tensors(self) -> list[Tensor]:
        return [x for argument in self.arguments.values() for x in leaves(argument) if isinstance(x, Tensor)]

    @property
    def first(self) -> Tensor:
        return self.tensors[0]


@dataclass(frozen=True)
class Limit:
    """operators: a pattern of whole names without overload; refuses: True where the device says no."""

    operators: str
    refuses: Callable[[Call], bool]
    message: str
    source: str


def by_operator(table: Iterable[Any]) -> Callable[[Call], list[Any]]:
    """Return a function: call -> the rows whose pattern `operators` is its operator's. A name is compared once."""

    @cache
    def rows(packet: str) -> list[Any]:
        return [row for row in table if re.fullmatch(row.operators, packet)]

    return lambda call: rows(call.packet)


def bind(schema: torch.FunctionSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults filled in."""
    given = dict(zip((a.name for a in schema.arguments), args)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def dtype_in(*dtypes: torch.dtype) -> Callable[[Call], bool]:
    return lambda call: call.first.dtype in dtypes


def dtype_not_in(*dtypes: torch.dtype) -> Callable[[Call], bool]:
    return lambda call: call.first.dtype not in dtypes


def mixed_dtypes(*names: str) -> Callable[[Call], bool]:
    return lambda call: len({call.arguments[n].dtype for n in names if call.arguments[n] is not None}) > 1


def contiguous(*names: str) -> Callable[[Call], bool]:
    """True where one of the named tensors is not contiguous."""
    return lambda call: any(call.arguments[n] is not None and not call.arguments[n].is_contiguous() for n in names)


def empty(call: Call) -> bool:
    return any(x.numel() == 0 for x in call.tensors)


def has_double(call: Call) -> bool:
    doubles = (torch.float64, torch.complex128)
    made = call.arguments.get("dtype") in doubles and call.operator != "aten::_to_copy"
    return made or any(x.dtype in doubles and (x.dim() > 0 or x.device.type == "npu") for x in call.tensors)


def long_dimension(call: Call) -> bool:
    shapes = [x.shape for x in (call.input, call.weight, call.bias) if x is not None]
    return any(size > MAX_CONV_DIM for shape in shapes for size in shape)


def between(low: int, high: int, values: Callable[[Call], Any]) -> Callable[[Call], bool]:
    """True where one of the values lies outside low..high."""
    return lambda call: not all(low <= v <= high for v in values(call))


def transposed(test: Callable[[Call], bool]) -> Callable[[Call], bool]:
    return lambda call: call.transposed and test(call)


def forward(test: Callable[[Call], bool]) -> Callable[[Call], bool]:
    return lambda call: not call.transposed and test(call)


def repeated_too_much(call: Call) -> bool:
    """True for 2^22 elements or more. repeat_interleave(self, repeats) or repeat_interleave(repeats)."""
    repeats, x = call.repeats, call.arguments.get("self")
    times = repeats.sum().item() if isinstance(repeats, Tensor) else repeats
    return bool(times * (1 if x is None else x.numel()) >= 2**22)


def rotary_shape(call: Call) -> bool:
    """True unless r1 and r2 have one of the documented broadcast forms of the 3-D or 4-D first argument."""
    x, cos, sin = call.tensors[:3]
    if cos.shape != sin.shape or cos.dim() != x.dim():
        return True
    forms = {  # dimensions that may be 1, per layout
        3: [{1}],  # TND: T1D
        4: [{0, 2}, {2}, set(), {0, 1}, {1}],  # BSND: 1S1D BS1D BSND; BNSD: 11SD B1SD BNSD
    }[x.dim()]
    return not any(all(cos.shape[i] == (1 if i in form else x.shape[i]) for i in range(x.dim())) for form in forms)


# --- fused attention: q, k, v in one of the layouts -----------------------------------------------------------------
LAYOUTS = {"BSH": "BSH", "BSND": "BSND", "BNSD": "BNSD", "BNSD_BSND": "BNSD", "TND": "TND"}  # of the input


@dataclass(frozen=True)
class AttentionSizes:
    """The sizes of one fused-attention call, whatever its layout."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int


def attention_sizes(call: Call) -> AttentionSizes:
    """Return the sizes of a fused-attention call from its layout."""
    layout, q, k, heads = LAYOUTS[call.input_layout], call.query, call.key, call.num_heads
    kv_heads = call.num_key_value_heads or heads
    sizes, kv_sizes = dict(zip(layout, q.shape)), dict(zip(layout, k.shape))
    if layout == "BSH":
        return AttentionSizes(q.shape[0], q.shape[1], k.shape[1], heads, kv_heads, q.shape[2] // heads)
    along = "T" if layout == "TND" else "S"
    batch = len(call.actual_seq_lengths or [0]) if layout == "TND" else sizes["B"]
    return AttentionSizes(batch, sizes[along], kv_sizes[along], heads, kv_heads, sizes["D"])


def heads_disagree(call: Call) -> bool:
    layout, sizes = LAYOUTS[call.input_layout], attention_sizes(call)
    if layout == "BSH":
        return call.query.shape[2] % sizes.heads != 0 or call.key.shape[2] != sizes.kv_heads * sizes.head_dim
    axis = layout.index("N")
    return call.query.shape[axis] != sizes.heads or call.key.shape[axis] != sizes.kv_heads


def head_ratio(call: Call) -> bool:
    sizes = attention_sizes(call)
    return sizes.heads % sizes.kv_heads != 0 or sizes.heads // sizes.kv_heads > 64 or sizes.heads > 256


def mask_shape(call: Call) -> bool:
    mask, sizes = call.atten_mask, attention_sizes(call)
    if call.sparse_mode in (2, 3, 4):
        return mask is None or tuple(mask.shape[-2:]) != (2048, 2048) or mask.numel() != 2048 * 2048
    if mask is None:
        return False
    b, s, t = sizes.batch, sizes.queries, sizes.keys
    *outer, rows, keys = mask.shape
    if keys < t or outer not in ([], [1], [1, 1], [b, 1]):
        return True
    return rows < (b if s == 1 and not outer else s)


def lengths_disagree(call: Call) -> bool:
    lengths, sizes = call.actual_seq_lengths_kv, attention_sizes(call)
    if lengths is None or call.input_layout == "TND":
        return False
    return 1 < len(lengths) < sizes.batch or any(not 0 <= n <= sizes.keys for n in lengths)


FIA = "npu_fused_infer_attention_score"
ATTENTION = f"npu::{FIA}"
ANY = ".*"


def op_plugin(page: str) -> str:
    return f"op-plugin docs, {page}"


def native_api(page: str) -> str:
    return f"native API, {page}"


def wide_row(call: Call) -> bool:
    sizes = attention_sizes(call)
    return call.input_layout in ("BSH", "BSND") and sizes.heads * sizes.head_dim >= 65535


def single_row(call: Call) -> bool:
    return call.input_layout == "BNSD_BSND" and attention_sizes(call).queries == 1


def always(call: Call) -> bool:
    return True


def scaled(call: Call) -> bool:
    return any(call.arguments.get(name) is not None for name in ("scales", "scale_factors"))


def spans(call: Call) -> list[int]:
    return [*call.weight.shape[2:], *call.dilation]


def odd_gamma(call: Call) -> bool:
    return call.gamma.dtype not in (call.input.dtype, torch.float32)


def odd_rotary_dim(call: Call) -> bool:
    return call.first.shape[-1] % 2 == 1 or call.first.shape[-1] >= 896


def odd_indices(call: Call) -> bool:
    return call.indices.dtype not in (torch.int32, torch.int64)


def many_heads(call: Call) -> bool:
    x = call.first
    return x.shape[0] >= 1000 or min(x.shape[1], x.shape[-2]) >= 1000


def bad_mask_dtype(call: Call) -> bool:
    return call.atten_mask is not None and call.atten_mask.dtype not in (torch.bool, torch.int8, torch.uint8)


def long_decode(call: Call) -> bool:
    sizes = attention_sizes(call)
    return call.input_layout != "TND" and sizes.queries == 1 and sizes.keys > 262144


def bad_head_dim(call: Call) -> bool:
    head_dim = attention_sizes(call).head_dim
    return head_dim % 16 != 0 or head_dim > 512


def wide_products(call: Call) -> bool:
    return call.x.dim() != 2 or call.weight.dim() != 2 or call.x.shape[1] != call.weight.shape[0]


def odd_weight(call: Call) -> bool:
    return call.weight.dtype not in (torch.int8, torch.int32)


def odd_scale(call: Call) -> bool:
    """True unless there is one scale, one a column, or one a group of rows and column."""
    (K, N), group = call.weight.shape, call.antiquant_group_size
    forms = {(1,), (1, 1), (N,), (1, N)} | ({(-(-K // group), N)} if group else set())
    return tuple(call.antiquant_scale.shape) not in forms


def odd_group(call: Call) -> bool:
    group = call.antiquant_group_size
    return group != 0 and not (32 <= group < call.weight.shape[0] and group % 32 == 0)


def odd_int8_bias(call: Call) -> bool:
    wanted = {torch.bfloat16: torch.float32, torch.float16: torch.float16}
    return call.bias is not None and call.bias.dtype != wanted[call.x.dtype]


CONV = "aclnnConvolution, limits on A2/A3"
RMS, ADD_RMS, ROTARY, SWIGLU, SCATTER = (
    op_plugin(f"npu_{page}") for page in ("rms_norm", "add_rms_norm", "rotary_mul", "swiglu", "scatter_nd_update_")
)
FIA_DOCS = op_plugin(FIA)
INT8 = "npu::npu_weight_quant_batchmatmul"
INT8_DOCS = op_plugin("npu_weight_quant_batchmatmul")
TILING = "fused_infer_attention_score_tiling_check_feature.cpp, cannmirror/ops-transformer v8.5.0"
FIA_85 = f"op-plugin docs of branch 7.3.0 (CANN 8.5), {FIA}"

# operators: the whole name without overload; refuses; what the message says; source
LIMITS = tuple(
    Limit(*row)
    for row in (
        # all operators
        (ANY, has_double, "float64 is not computed on the device", op_plugin("factory ops")),
        # single operators of PyTorch
        ("aten::_fft_.*", always, "FFTs are not in the support list", native_api("torch.fft")),
        ("aten::abs_?", dtype_in(torch.complex64, torch.complex128), "abs of complex numbers", native_api("torch.abs")),
        (
            "aten::(cos|sin)_?",
            dtype_in(torch.int64, torch.int32),
            "integer input",
            "aclnnInplaceCos, dtypes of selfRef",
        ),
        ("aten::cumsum_?", dtype_in(torch.bfloat16), "dtype: float16, float32, integers", native_api("torch.cumsum")),
        ("aten::sort", dtype_in(torch.bfloat16), "dtype: float16, float32, integers", native_api("torch.sort")),
        ("aten::topk", lambda call: not call.sorted, "sorted=False", native_api("torch.topk")),
        ("aten::multinomial", dtype_in(torch.bfloat16), "dtype: float16, float32", native_api("torch.multinomial")),
        ("aten::repeat_interleave", dtype_in(torch.bfloat16), "bfloat16", native_api("torch.repeat_interleave")),
        ("aten::repeat_interleave", repeated_too_much, "2^22 elements or more", native_api("torch.repeat_interleave")),
        ("aten::(replication|reflection)_pad.*", dtype_in(torch.bfloat16), "bfloat16", native_api("ReplicationPad1d")),
        ("aten::upsample_.*", scaled, "scale_factor; pass size", native_api("torch.nn.functional.interpolate")),
        # convolutions
        ("aten::convolution", mixed_dtypes("input", "weight", "bias"), "input, weight and bias in one dtype", CONV),
        ("aten::convolution", forward(dtype_not_in(*CONV_DTYPES)), "dtype: float16, float32", native_api("Conv1d")),
        (
            "aten::convolution",
            transposed(dtype_not_in(torch.float32)),
            "transposed: dtype: float32",
            native_api("ConvTranspose1d"),
        ),
        ("aten::convolution", long_dimension, f"dimensions over {MAX_CONV_DIM}", CONV),
        ("aten::convolution", between(1, 65535, lambda call: [call.groups]), "groups 1..65535", CONV),
        ("aten::convolution", forward(between(0, 255, lambda call: call.padding)), "padding 0..255", CONV),
        ("aten::convolution", transposed(between(1, 255, spans)), "transposed: kernel and dilation 1..255", CONV),
        # fused operators
        ("npu::npu_(swiglu|rms_norm|add_rms_norm|gelu|rotary_mul)", dtype_not_in(*FLOATS), "dtype", SWIGLU),
        ("npu::npu_swiglu", contiguous("input"), "input must be contiguous", SWIGLU),
        ("npu::npu_swiglu", empty, "input must not be empty", SWIGLU),
        ("npu::npu_swiglu", lambda call: call.input.shape[call.dim] % 2 == 1, "the dimension must be even", SWIGLU),
        ("npu::npu_rms_norm", odd_gamma, "gamma in the dtype of x or float32", RMS),
        ("npu::npu_rms_norm", lambda call: not 2 <= call.input.dim() <= 8, "2 to 8 dimensions", RMS),
        ("npu::npu_add_rms_norm", mixed_dtypes("x1", "x2", "gamma"), "x1, x2 and gamma in one dtype", ADD_RMS),
        ("npu::npu_add_rms_norm", empty, "no empty tensors", ADD_RMS),
        ("npu::npu_gelu", lambda call: call.input.dim() > 8, "at most 8 dimensions", "aclnnGeluV2"),
        ("npu::npu_rotary_mul", lambda call: call.first.dim() not in (3, 4), "3 or 4 dimensions", ROTARY),
        ("npu::npu_rotary_mul", odd_rotary_dim, "head_dim even and under 896", ROTARY),
        ("npu::npu_rotary_mul", rotary_shape, "cos and sin in a documented broadcast form", ROTARY),
        ("npu::npu_rotary_mul", many_heads, "batch and heads under 1000", ROTARY),
        ("npu::npu_scatter_nd_update_", lambda call: call.indices.dim() < 2, "indices of rank 2 or more", SCATTER),
        ("npu::npu_scatter_nd_update_", odd_indices, "indices int32 or int64", SCATTER),
        # products with 8-bit weights
        (INT8, dtype_not_in(*HALF), "dtype of x: float16, bfloat16", INT8_DOCS),
        (INT8, odd_weight, "dtype of weight: int8, int32", INT8_DOCS),
        (INT8, empty, "no empty tensor", INT8_DOCS),
        (INT8, wide_products, "x (M, K) and weight (K, N)", INT8_DOCS),
        (INT8, between(1, 65535, lambda call: call.weight.shape), "K and N 1..65535", INT8_DOCS),
        (INT8, mixed_dtypes("x", "antiquant_scale"), "antiquant_scale in the dtype of x", INT8_DOCS),
        (INT8, odd_group, "antiquant_group_size 32..K-1, a multiple of 32", INT8_DOCS),
        (INT8, odd_scale, "shape of antiquant_scale: one, one a channel, or one a group and channel", INT8_DOCS),
        (INT8, odd_int8_bias, "bias float32 with bfloat16, float16 with float16", INT8_DOCS),
        (INT8, contiguous("bias"), "bias must be contiguous", INT8_DOCS),
        # fused attention
        (ATTENTION, lambda call: call.input_layout not in LAYOUTS, "layout", FIA_DOCS),
        (ATTENTION, dtype_not_in(*HALF), "dtype of query: float16, bfloat16", FIA_DOCS),
        (ATTENTION, mixed_dtypes("query", "key", "value"), "key and value in the dtype of query", FIA_DOCS),
        (ATTENTION, contiguous("query", "key", "value", "atten_mask"), "inputs must be contiguous", FIA_DOCS),
        (ATTENTION, lambda call: call.key.shape != call.value.shape, "key and value of one shape", FIA_DOCS),
        (ATTENTION, heads_disagree, "num_heads and num_key_value_heads against the shapes", FIA_DOCS),
        (ATTENTION, head_ratio, "at most 256 heads, a multiple of key/value heads, ratio at most 64", FIA_DOCS),
        (ATTENTION, bad_head_dim, "head_dim a multiple of 16, at most 512", FIA_DOCS),
        (ATTENTION, lambda call: call.input_layout == "TND" and call.query.shape[-1] != 128, "TND needs D 128", FIA_85),
        (ATTENTION, wide_row, "N*D under 65535 in BSH and BSND", FIA_DOCS),
        (ATTENTION, single_row, "BNSD_BSND needs more than one query", FIA_DOCS),
        (ATTENTION, lambda call: call.scale == 1.0, "scale was left at its default of 1.0", FIA_DOCS),
        (ATTENTION, lambda call: call.sparse_mode not in range(5), "sparse_mode 0 to 4", FIA_DOCS),
        (ATTENTION, bad_mask_dtype, "dtype of atten_mask: bool, int8, uint8", FIA_DOCS),
        (ATTENTION, mask_shape, "shape of atten_mask for this sparse_mode (2, 3, 4: 2048 x 2048)", TILING),
        (ATTENTION, lengths_disagree, "actual_seq_lengths_kv: one length, or one a row, within the cache", TILING),
        (ATTENTION, long_decode, "decode reads at most 262144 rows", FIA_DOCS),
    )
)


limits_of = by_operator(LIMITS)


def broken_limit(call: Call, rows: Callable[[Call], list[Limit]] = limits_of) -> Limit | None:
    """Return the first limit that refuses the call. Later ones may rely on what earlier ones have let through."""
    return next((limit for limit in rows(call) if limit.refuses(call)), None)
