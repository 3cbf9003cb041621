"""The forms of the vocoder's operators on an NPU: exact, and chosen by what they move and launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulation import device
from torch import Tensor

from covo_npu.kernels import native, npu
from covo_npu.runtime.networks.bigvgan import PIECE_FRAMES_OF_A_DEVICE
from covo_npu.tools.synth.config import PRESETS

UP = tuple((torch.rand(12, generator=torch.Generator().manual_seed(1)) / 6).tolist())
DOWN = tuple((torch.rand(12, generator=torch.Generator().manual_seed(2)) / 6).tolist())
BLOCK = npu.BLOCK


def snake_inputs(length: int, channels: int = 3) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(length)
    x = torch.randn(2, channels, length, generator=random)
    return x, *torch.rand(2, channels, generator=random) + 0.5, UP, DOWN


@pytest.mark.parametrize(
    "length", [1, 2, 3, 11, 20, *range(BLOCK - 12, BLOCK + 8), *range(2 * BLOCK - 5, 2 * BLOCK + 7)]
)
@pytest.mark.parametrize(("starts", "ends"), [(True, True), (True, False), (False, True), (False, False)])
def test_blocks_of_the_activation_are_the_native_form(length: int, starts: bool, ends: bool) -> None:
    """Every length around one and two blocks: where edges fall into another block than the samples they decide."""
    if length + 5 * (starts + ends) <= 10:
        return
    x, alpha, inverse_beta, *taps = snake_inputs(length)
    expected = native.anti_aliased_snake(x, alpha, inverse_beta, *taps, starts, ends)
    found = npu.anti_aliased_snake(*(y.to("npu") for y in (x, alpha, inverse_beta)), *taps, starts, ends).cpu()
    assert found.shape == expected.shape
    assert torch.allclose(
        found, expected, rtol=0, atol=16 * torch.finfo(torch.float32).eps * 8
    )  # 12 products of up to 8


def as_convolutions(
    x: Tensor, alpha: Tensor, inverse_beta: Tensor, up: tuple[float, ...], down: tuple[float, ...]
) -> Tensor:
    """The phases as channels of two convolutions, inside of a signal."""
    batch, channels, _ = x.shape
    rise = torch.tensor([[2 * tap for tap in up[11::-2]], [2 * tap for tap in up[10::-2]]])[:, None].to(x.device)
    fall = torch.tensor([down[1::2], down[0::2]])[None].to(x.device)
    y = F.conv1d(x.reshape(batch * channels, 1, -1), rise).view(batch, channels, 2, -1)
    y = torch.addcmul(y, torch.sin(y * alpha[:, None, None]).square_(), inverse_beta[:, None, None])
    return F.conv1d(y.view(batch * channels, 2, -1), fall).view(batch, channels, -1)


def test_the_activation_moves_the_fewest_bytes_of_its_forms() -> None:
    x, alpha, inverse_beta, *taps = (y.to("npu") if isinstance(y, Tensor) else y for y in snake_inputs(8192, 24))

    def cost(form: Any, *edges: bool) -> tuple[int, int]:
        form(x, alpha, inverse_beta, *taps, *edges)
        with device.log.recording() as log:
            form(x, alpha, inverse_beta, *taps, *edges)
        return log.moved_bytes, len(log.launches)

    ours, launches = cost(npu.anti_aliased_snake, False, False)
    convolutions, few = cost(as_convolutions)
    slices, many = cost(native.anti_aliased_snake, False, False)
    assert 2 * ours < convolutions and 2 * ours < slices, (ours, convolutions, slices)
    assert launches <= few + 3 and 3 * launches < many, (launches, few, many)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(
    ("batch", "length", "kernel", "stride"), [(1, 9, 10, 5), (3, 8, 4, 2), (2, 7, 12, 4), (1, 5, 3, 3)]
)
def test_a_transposed_convolution_as_products(batch: int, length: int, kernel: int, stride: int, padding: int) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((batch, 6, length), (6, 4, kernel), (4,)))
    expected = F.conv_transpose1d(x.double(), weight.double(), bias.double(), stride, padding)
    found = npu._transposed_as_products(x.to("npu"), weight.to("npu"), bias.to("npu"), stride, padding).cpu()
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5)


def test_which_convolutions_of_the_real_vocoder_have_no_fast_way() -> None:
    """A piece of a long reply: the first alone. Two replies side by side, or a short piece: more of them."""
    config = PRESETS["full"].token2wav.vocoder

    def slow_stages(batch: int, frames: int) -> list[int]:
        found, length = [], frames
        for stage, rate in enumerate(config.upsample_rates):
            channels = config.initial_channels // 2**stage
            x = torch.empty(batch, 1, length, device="meta").expand(-1, channels, -1)
            weight = torch.empty(channels, 1, 2 * rate, device="meta")
            found += [stage] if npu.transposes_slowly(x, weight, rate) else []
            length *= rate
        return found

    assert slow_stages(1, PIECE_FRAMES_OF_A_DEVICE) == [0]
    assert slow_stages(2, PIECE_FRAMES_OF_A_DEVICE) == [0, 1, 2, 3, 4, 5]
    assert slow_stages(1, 60) == [0, 1, 2, 3]
