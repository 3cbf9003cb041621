"""linear on the CPU: one row of bfloat16 and several rows each take a way of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

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
