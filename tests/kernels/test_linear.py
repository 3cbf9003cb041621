"""linear on the CPU: one row of 16-bit numbers and several rows each take a way of their own."""

from __future__ import annotations

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


def test_the_row_goes_past_onednn_and_everything_else_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = torch.nn.functional.linear

    def watched(*args: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.mkldnn.enabled)
        return real(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    monkeypatch.setattr(native, "FUSED_DTYPES", ())
    weight = torch.ones(4, 6)
    native.linear(torch.ones(1, 6).bfloat16(), weight.bfloat16())
    native.linear(torch.ones(2, 6).bfloat16(), weight.bfloat16())
    native.linear(torch.ones(1, 6), weight)
    assert seen == [not native.PLAIN_ROW, True, True]
    assert torch.backends.mkldnn.enabled


def test_the_switch_is_put_back_after_a_fault() -> None:
    with pytest.raises(RuntimeError):
        native.linear(torch.ones(1, 6).bfloat16(), torch.ones(4, 7).bfloat16())
    assert torch.backends.mkldnn.enabled


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
