"""Each documented limit of the device has a call here that breaks it, and the emulation refuses it by its name."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from emulation.limits import Limit
from emulation.rules import DEVICE_LIMITS as LIMITS
from emulation.rules import RefusedError
from emulation.signatures import RUNS_2_9, SignatureError
from torch import Tensor

from covo_npu.kernels.npu import open_device

DEVICE = open_device(0)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype).to(DEVICE)


def there(x: Tensor) -> Tensor:
    return x.contiguous().to(DEVICE)


def half(*shape: int) -> Tensor:
    return ones(*shape, dtype=torch.float16)


def brain(*shape: int) -> Tensor:
    return ones(*shape, dtype=torch.bfloat16)


def complex_numbers() -> Tensor:
    return torch.view_as_complex(ones(3, 2))


def file_mapping() -> Tensor:
    with Path(__file__).open("rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def rotary(x: Tensor, table: Tensor) -> Tensor:
    return torch_npu.npu_rotary_mul(x, table, table, rotary_mode="half")


def scatter(indices: Tensor) -> Tensor:
    return torch_npu.npu_scatter_nd_update_(ones(8, 4), indices, ones(1, 4))


def attend(*, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, **options: Any) -> Tensor:
    """One good call of the fused attention (BNSD: 5 queries, 9 keys, 4 heads on 2), with what a case changes."""
    q = half(1, 4, 5, 32) if q is None else q
    k = half(1, 2, 9, 32) if k is None else k
    good = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.5, "input_layout": "BNSD"}
    attention = torch_npu.npu_fused_infer_attention_score
    return attention(q, k, k if v is None else v, **{**good, **options})[0]


def eight(*shape: int) -> Tensor:
    return ones(*shape, dtype=torch.int8)


def product(
    *, x: Tensor | None = None, weight: Tensor | None = None, scale: Tensor | None = None, **options: Any
) -> Tensor:
    """One good call of the product with 8-bit weights (3 rows, K 64, N 48), with what a case changes."""
    x = brain(3, 64) if x is None else x
    weight = eight(48, 64).t() if weight is None else weight
    return torch_npu.npu_weight_quant_batchmatmul(x, weight, brain(48) if scale is None else scale, **options)


def triangle(size: int = 2048, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(size, size, dtype=dtype).triu(1).to(DEVICE)


# message of the limit: calls that break it
BREAKS: dict[str, list[Callable[[], Any]]] = {
    "float64 is not computed on the device": [
        lambda: torch.ones(3, dtype=torch.float64).to(DEVICE),
        *([] if RUNS_2_9 else [lambda: ones(3).double()]),  # 2.9 makes it float32, and warns
        lambda: torch.zeros(3, dtype=torch.float64, device=DEVICE),
    ],
    "a tensor is on the CPU": [lambda: ones(3) + torch.ones(3)],
    "a copy from a file mapping may hang": [lambda: file_mapping().to(DEVICE)],
    "FFTs are not in the support list": [lambda: torch.fft.rfft(ones(8))],
    "abs of complex numbers": [lambda: complex_numbers().abs()],
    "integer input": [lambda: torch.arange(3, device=DEVICE).cos(), lambda: torch.arange(3, device=DEVICE).sin()],
    "dtype: float16, float32, integers": [lambda: brain(3).cumsum(0), lambda: brain(3).sort()],
    "sorted=False": [lambda: ones(5).topk(2, sorted=False)],
    "dtype: float16, float32": [
        lambda: torch.multinomial(brain(3), 1),
        lambda: F.conv1d(brain(1, 2, 9), brain(2, 2, 3)),
    ],
    "bfloat16": [
        lambda: brain(3, 2).repeat_interleave(2, 0),
        lambda: F.pad(brain(1, 2, 9), (2, 2), "replicate"),
        lambda: F.pad(brain(1, 2, 9), (2, 2), "reflect"),
    ],
    "2^22 elements or more": [lambda: ones(1024, 2).repeat_interleave(2048, 0)],
    "scale_factor; pass size": [lambda: F.interpolate(ones(1, 2, 9), scale_factor=2.5, mode="linear")],
    "input, weight and bias in one dtype": [lambda: F.conv1d(ones(1, 2, 9), half(2, 2, 3))],
    "transposed: dtype: float32": [lambda: F.conv_transpose1d(half(1, 2, 9), half(2, 2, 3))],
    "dimensions over 1000000": [lambda: F.conv1d(ones(1, 1, 1_000_001), ones(1, 1, 3))],
    "groups 1..65535": [lambda: F.conv1d(ones(1, 65536, 3), ones(65536, 1, 3), groups=65536)],
    "padding 0..255": [lambda: F.conv1d(ones(1, 2, 9), ones(2, 2, 3), padding=256)],
    "transposed: kernel and dilation 1..255": [lambda: F.conv_transpose1d(ones(1, 2, 9), ones(2, 2, 256))],
    "dtype": [lambda: torch_npu.npu_swiglu(torch.ones(3, 4, dtype=torch.int32).to(DEVICE), dim=-1)],
    "input must be contiguous": [lambda: torch_npu.npu_swiglu(ones(4, 6).T, dim=-1)],
    "input must not be empty": [lambda: torch_npu.npu_swiglu(ones(0, 4), dim=-1)],
    "the dimension must be even": [lambda: torch_npu.npu_swiglu(ones(4, 5), dim=-1)],
    "gamma in the dtype of x or float32": [lambda: torch_npu.npu_rms_norm(ones(2, 4), brain(4), 1e-6)],
    "2 to 8 dimensions": [lambda: torch_npu.npu_rms_norm(ones(4), ones(4), 1e-6)],
    "x1, x2 and gamma in one dtype": [lambda: torch_npu.npu_add_rms_norm(brain(2, 4), brain(2, 4), ones(4), 1e-6)],
    "no empty tensors": [lambda: torch_npu.npu_add_rms_norm(ones(0, 4), ones(0, 4), ones(4), 1e-6)],
    "at most 8 dimensions": [lambda: torch_npu.npu_gelu(ones(*[1] * 9), approximate="none")],
    "3 or 4 dimensions": [lambda: rotary(ones(2, 64), ones(2, 64))],
    "head_dim even and under 896": [lambda: rotary(ones(1, 2, 3, 63), ones(1, 2, 1, 63))],
    "cos and sin in a documented broadcast form": [lambda: rotary(ones(1, 2, 3, 64), ones(1, 2, 1, 32))],
    "batch and heads under 1000": [lambda: rotary(ones(1000, 2, 3, 64), ones(1, 2, 1, 64))],
    "indices of rank 2 or more": [lambda: scatter(torch.zeros(1, dtype=torch.int64).to(DEVICE))],
    "indices int32 or int64": [lambda: scatter(torch.zeros(1, 1, dtype=torch.int16).to(DEVICE))],
    "dtype of x: float16, bfloat16": [lambda: product(x=ones(3, 64), scale=ones(48))],
    "dtype of weight: int8, int32": [lambda: product(weight=brain(64, 48))],
    "no empty tensor": [lambda: product(x=brain(0, 64))],
    "x (M, K) and weight (K, N)": [lambda: product(x=brain(3, 2, 64)), lambda: product(x=brain(3, 63))],
    "K and N 1..65535": [
        lambda: product(x=brain(1, 65536), weight=eight(48, 65536).t()),
        lambda: product(weight=eight(65536, 64).t(), scale=brain(65536)),
    ],
    "antiquant_scale in the dtype of x": [lambda: product(scale=ones(48))],
    "antiquant_group_size 32..K-1, a multiple of 32": [
        lambda: product(scale=brain(2, 48), antiquant_group_size=48),
        lambda: product(scale=brain(1, 48), antiquant_group_size=64),
    ],
    "shape of antiquant_scale: one, one a channel, or one a group and channel": [
        lambda: product(scale=brain(64)),
        lambda: product(scale=brain(3, 48), antiquant_group_size=32),
    ],
    "bias float32 with bfloat16, float16 with float16": [
        lambda: product(bias=brain(48)),
        lambda: product(x=half(3, 64), scale=half(48), bias=ones(48)),
    ],
    "bias must be contiguous": [lambda: product(bias=ones(96)[::2])],
    "layout": [lambda: attend(input_layout="SBH")],
    "dtype of query: float16, bfloat16": [lambda: attend(q=ones(1, 4, 5, 32))],
    "key and value in the dtype of query": [lambda: attend(k=brain(1, 2, 9, 32))],
    "inputs must be contiguous": [lambda: attend(q=half(1, 5, 4, 32).transpose(1, 2))],
    "key and value of one shape": [lambda: attend(v=half(1, 2, 8, 32))],
    "num_heads and num_key_value_heads against the shapes": [
        lambda: attend(num_heads=2),
        lambda: attend(num_key_value_heads=4),
    ],
    "at most 256 heads, a multiple of key/value heads, ratio at most 64": [
        lambda: attend(q=half(1, 5, 5, 32), num_heads=5),
        lambda: attend(q=half(1, 65, 5, 32), num_heads=65, k=half(1, 1, 9, 32), num_key_value_heads=1),
    ],
    "head_dim a multiple of 16, at most 512": [lambda: attend(q=half(1, 4, 5, 24), k=half(1, 2, 9, 24))],
    "TND needs D 128": [
        lambda: attend(
            q=half(5, 4, 64), k=half(9, 2, 64), input_layout="TND", actual_seq_lengths=[5], actual_seq_lengths_kv=[9]
        )
    ],
    "N*D under 65535 in BSH and BSND": [
        lambda: attend(
            q=half(1, 1, 256, 256), k=half(1, 1, 256, 256), num_heads=256, num_key_value_heads=256, input_layout="BSND"
        )
    ],
    "BNSD_BSND needs more than one query": [lambda: attend(q=half(1, 4, 1, 32), input_layout="BNSD_BSND")],
    "a cast of a part of a memory": [
        lambda: torch_npu.npu_format_cast(half(4, 8)[2:], 29),
        lambda: torch_npu.npu_format_cast(
            torch.ones(64, dtype=torch.uint8).to(DEVICE).view(torch.float16).view(4, 8), 29
        ),
    ],
    "scale was left at its default of 1.0": [lambda: attend(scale=1.0)],
    "sparse_mode 0 to 4": [lambda: attend(sparse_mode=5)],
    "dtype of atten_mask: bool, int8, uint8": [lambda: attend(atten_mask=half(5, 9))],
    "shape of atten_mask for this sparse_mode (2, 3, 4: 2048 x 2048)": [
        lambda: attend(atten_mask=triangle(1024), sparse_mode=3),
        lambda: attend(atten_mask=ones(4, 9, dtype=torch.bool)),
        lambda: attend(atten_mask=ones(5, 8, dtype=torch.bool)),
        lambda: attend(q=half(3, 4, 1, 32), k=half(3, 2, 9, 32), atten_mask=ones(2, 9, dtype=torch.bool)),
        lambda: attend(sparse_mode=3),
    ],
    "the mask of sparse_mode 2, 3, 4 is torch.triu(ones, 1)": [lambda: attend(atten_mask=~triangle(), sparse_mode=3)],
    "actual_seq_lengths_kv: one length, or one a row, within the cache": [
        lambda: attend(actual_seq_lengths_kv=[10]),
        lambda: attend(q=half(3, 4, 5, 32), k=half(3, 2, 9, 32), actual_seq_lengths_kv=[3, 4]),
    ],
    "decode reads at most 262144 rows": [
        lambda: attend(q=half(1, 1, 1, 16), k=half(1, 1, 262145, 16), num_heads=1, num_key_value_heads=1)
    ],
}


def test_every_limit_is_broken_here_and_has_a_source() -> None:
    assert {limit.message for limit in LIMITS} == set(BREAKS)
    assert all(limit.source for limit in LIMITS)


@pytest.mark.parametrize("message", BREAKS)
def test_the_device_refuses(message: str) -> None:
    limits = [limit for limit in LIMITS if limit.message == message]
    assert len(BREAKS[message]) >= len(limits)  # one call a limit at least
    hit: set[Limit] = set()
    for call in BREAKS[message]:
        with pytest.raises(RefusedError) as refused:
            call()
        hit |= {limit for limit in limits if f"{message} ({limit.source})" in str(refused.value)}
    assert hit == set(limits)


def test_the_good_calls_run() -> None:
    """What the broken calls are broken from."""
    assert attend().shape == (1, 4, 5, 32)
    assert attend(input_layout="BNSD_BSND", atten_mask=triangle(), sparse_mode=3).shape == (1, 5, 4, 32)
    assert attend(q=half(1, 4, 1, 32), actual_seq_lengths_kv=[7]).shape == (1, 4, 1, 32)
    everything = ones(5, 9, dtype=torch.bool)  # True: not attended, so no key is left, and the row is the mean
    mean = attend(v=there(rising := torch.arange(9).half()[:, None].expand(1, 2, 9, 32)), atten_mask=everything)
    assert torch.allclose(mean.cpu(), rising.float().mean(2, keepdim=True).half().repeat(1, 2, 5, 1))
    first = attend(q=half(1, 4, 1, 32), v=there(rising), atten_mask=triangle(), sparse_mode=2)
    assert not first.any()  # one query anchored top-left sees the first key alone
    assert attend(atten_mask=triangle(9)).shape == (1, 4, 5, 32)  # more rows than queries
    whole = {"q": half(2, 5, 4, 32), "k": half(2, 9, 4, 32), "num_key_value_heads": 4, "input_layout": "BSND"}
    assert attend(**whole, atten_mask=ones(5, 9, dtype=torch.bool)).shape == (2, 5, 4, 32)  # for all rows of the batch
    assert attend(actual_seq_lengths_kv=[0, 3]).shape == (1, 4, 5, 32)  # more lengths than rows, and none
    assert attend(q=half(1, 4, 1, 32), atten_mask=ones(1, 12, dtype=torch.bool)).shape == (1, 4, 1, 32)
    assert torch_npu.npu_format_cast(half(4, 8), 29).shape == (4, 8)
    assert rotary(ones(1, 2, 3, 64), ones(1, 2, 1, 64)).shape == (1, 2, 3, 64)
    assert F.conv1d(half(1, 2, 9), half(2, 2, 3), half(2)).shape == (1, 2, 7)
    assert F.conv_transpose1d(ones(1, 2, 9), ones(2, 2, 255)).shape == (1, 2, 263)
    assert scatter(torch.zeros(1, 1, dtype=torch.int32).to(DEVICE)).shape == (8, 4)
    assert product(bias=ones(48)).shape == (3, 48)
    assert product(x=half(3, 64), scale=half(1, 48), bias=half(48)).shape == (3, 48)
    assert file_mapping().clone().to(DEVICE).shape == file_mapping().shape


def test_a_refusal_names_the_operator() -> None:
    with pytest.raises(RefusedError, match=r"aten::abs on npu: abs of complex numbers .*complex64 \[3\]"):
        complex_numbers().abs()


def test_an_operator_that_torch_npu_lacks_does_not_fall_back_to_the_cpu() -> None:
    # 2.9 cannot disable its trip; there the emulation refuses the first step, the copy of the argument
    refusal = "aten::_copy_from_and_resize.*on the CPU" if RUNS_2_9 else "aten::special_bessel_j0.*fallback is disabled"
    with pytest.raises(RuntimeError, match=refusal):
        torch.special.bessel_j0(ones(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: torch_npu.npu_rms_norm(input=ones(2, 4), gamma=ones(4)),
            "2.9: npu_rms_norm: missing a required argument",
        ),
        (
            lambda: torch_npu.npu_swiglu(ones(2, 4), axis=-1),
            "2.9: npu_swiglu: got an unexpected keyword argument 'axis'",
        ),
        (lambda: torch_npu.npu_rotary_mul(ones(1, 2, 3, 64), *[ones(1, 2, 1, 64)] * 2, rotate=None), "'rotate'"),
        pytest.param(
            lambda: torch_npu.npu_apply_rotary_pos_emb(*[ones(1, 2, 1, 128)] * 4),
            "the default of layout changed after torch_npu 2.9; pass it",
            marks=pytest.mark.skipif(RUNS_2_9, reason="nothing changed yet"),
        ),
        (lambda: torch_npu.npu_fast_gelu(ones(2, 4)), "npu_fast_gelu is not in torch_npu-2.9-schemas.txt"),
    ],
)
def test_calls_that_torch_npu_2_9_would_read_otherwise_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(SignatureError) as refused:
        call()
    assert message in str(refused.value)
