"""linear on the CPU: one row of bfloat16 and several rows each take a way of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.kernels import native


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("size_in", "size_out"), [(3584, 260), (18944, 33), (7, 5)])
def test_one_row_has_at_most_twice_the_error_of_rounding(
    dtype: torch.dtype, has_bias: bool, size_in: int, size_out: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, size_in, generator=generator).to(dtype)
    weight = torch.randn(size_out, size_in, generator=generator).to(dtype)
    bias = torch.randn(size_out, generator=generator).to(dtype) * 10 if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = native.linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == (1, size_out)
    rounded = (expected.to(dtype).double() - expected).abs().max()
    assert 0 < (found.double() - expected).abs().max() <= 2 * rounded + 1e-12
    assert (native.linear(x, weight.flip(0), bias).double() - expected).abs().max() > 2 * rounded


def test_sums_of_8_bits_may_leave_the_range_of_float16_until_they_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever float16 is multiplied as it is: 921 of these 2048 were infinite."""
    monkeypatch.setattr(native, "SLOW_DTYPES", ())
    generator = torch.Generator().manual_seed(4)
    x = (torch.randn(32, 3584, generator=generator) * 20).half()
    weight = torch.randint(-127, 128, (64, 3584), generator=generator, dtype=torch.int8)
    expected = x.double() @ weight.double().T * 1e-3
    assert expected.abs().max() * 1000 > torch.finfo(torch.float16).max
    found = native.linear_int8(x, weight, torch.full((64,), 1e-3))
    assert found.dtype == torch.float16
    rounded = (expected.half().double() - expected).abs().max()
    assert (found.double() - expected).abs().max() <= 2 * rounded


def process_wide() -> tuple[object, ...]:
    onednn = torch.backends.mkldnn
    return onednn.enabled, torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()


def test_no_switch_of_the_process_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads multiply, a third watches: what one of them turned off for a moment the other would miss."""
    before, touched, seen = process_wide(), [], set()
    monkeypatch.setattr(torch._C, "_set_mkldnn_enabled", touched.append)
    done = threading.Event()

    def multiply(dtype: torch.dtype) -> None:
        weight, bias = torch.ones(64, 512, dtype=dtype), torch.ones(64, dtype=dtype)
        for rows in (1, 3) * 50:
            native.linear(torch.ones(rows, 512, dtype=dtype), weight, bias)
            native.linear_gelu_tanh(torch.ones(rows, 512, dtype=dtype), weight)

    def watch() -> None:
        while not done.is_set():
            seen.add(process_wide())

    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=multiply, args=(dtype,)) for dtype in (torch.bfloat16, torch.float16)]
    for thread in (watcher, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    watcher.join()
    assert touched == [] and seen == {before}


@pytest.mark.parametrize("dtype", native.FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("function", [native.linear, native.linear_gelu_tanh])
def test_views_are_multiplied_like_their_copies(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    """oneDNN would take a strided bias for a contiguous one."""
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 7, 38), (11, 57), (22,)))
    x, weight, bias = x[..., ::2], weight[:, 19:38], bias[::2]
    found = function(x, weight, bias)
    assert found.shape == (3, 7, 11)
    assert torch.equal(found, function(x.contiguous(), weight.contiguous(), bias.contiguous()))
    assert not torch.equal(found, function(x, weight, bias.roll(1)))
    assert function(x[:, :0], weight, bias).shape == (3, 0, 11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_the_cpu_is_slow_in_is_multiplied_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without instructions for 16-bit types: PyTorch sees none of them, results are rounded once."""
    monkeypatch.setattr(native, "SLOW_DTYPES", (torch.bfloat16, torch.float16))
    plain_conv1d = F.conv1d
    for function in ("linear", "conv1d", "scaled_dot_product_attention"):
        own = getattr(F, function)

        def wide(*arguments: Any, own: Callable[..., Tensor] = own, **options: Any) -> Tensor:
            assert all(tensor.dtype != dtype for tensor in arguments if isinstance(tensor, Tensor))
            return own(*arguments, **options)

        monkeypatch.setattr(F, function, wide)
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    size_out = 2 * native.WIDENED_ROWS + 3
    x, weight, bias = drawn(5, 70), drawn(size_out, 70), drawn(size_out)
    q, cache = drawn(6, 4, 8), drawn(1, 2, 11, 8)
    signal, taps = drawn(2, 6, 30), drawn(10, 3, 5)
    whole, scale = torch.randint(-127, 128, (size_out, 70), generator=generator), torch.rand(size_out)
    keys = cache[:, :, :9].double().repeat_interleave(2, dim=1)[0]  # [H, K, D]
    scores = torch.einsum("shd,hkd->hsk", q.double(), keys) * 0.3
    future = torch.ones(6, 9, dtype=torch.bool).triu(4)
    causal = torch.einsum("hsk,hkd->shd", scores.masked_fill(future, -torch.inf).softmax(-1), keys)
    heads = drawn(1, 5, 2, 8)
    among = (torch.einsum("bshd,bthd->bhst", heads.double(), heads.double()) * 0.3).softmax(-1)
    convolved = plain_conv1d(signal.double(), taps.double(), None, 2, 1, 1, 2)
    for found, expected in (
        (native.linear(x, weight, bias), x.double() @ weight.double().T + bias.double()),
        (native.linear(x, weight), x.double() @ weight.double().T),
        (native.linear_int8(x, whole.to(torch.int8), scale, bias), x.double() @ whole.double().T * scale + bias),
        (native.prefill_attention(q, cache, cache, 0, 9, 0.3), causal),
        (native.attention(heads, heads, heads, 0.3), torch.einsum("bhst,bthd->bshd", among, heads.double())),
        (native.conv1d(signal, taps, None, 2, 1, groups=2), convolved),
    ):
        assert found.dtype == dtype and found.shape == expected.shape
        # Half a step of dtype, and what sums of up to 70 products in float32 are off by.
        bound = expected.abs() * torch.finfo(dtype).eps / 2 + 70 * 2**-24 * expected.abs().max()
        assert ((found.double() - expected).abs() <= bound).all()
        assert ((found.roll(1, -1).double() - expected).abs() > bound).any()
