"""The vocoder against a plain formulation, in any pieces; how far it looks ahead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import FULL, random_token2wav
from runtime.speech_sizes import SMALL, small_token2wav, small_voice
from torch import Tensor

from covo_npu.kernels import native
from covo_npu.kernels.cpu import CPU
from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.networks import bigvgan
from covo_npu.runtime.networks.bigvgan import BigVGAN, Stream, StreamConv1d
from covo_npu.runtime.token2wav import SpeechDtypes
from covo_npu.tools.bench.stock_token2wav import StockToken2Wav
from covo_npu.tools.speech import recast

HOP = 240


@pytest.fixture(scope="module")
def networks():
    return small_token2wav()


@pytest.fixture(scope="module")
def vocoder(networks) -> BigVGAN:
    return networks.vocoder


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def in_pieces(vocoder: BigVGAN, x: Tensor, cuts: list[int]) -> Tensor:
    """Return the waveform of pieces that end at the cuts; a repeated cut is an empty piece."""
    stream, pieces = Stream(), []
    for start, end in zip([0, *cuts], [*cuts, x.shape[-1]]):
        pieces.append(vocoder.step(x[..., start:end], stream, ends=False))
    return torch.cat([*pieces, vocoder.step(x[..., :0], stream, ends=True)], -1)


@pytest.mark.parametrize("frames", [1, 2, 4, 29, 140])
def test_as_the_plain_formulation(networks, vocoder: BigVGAN, frames: int) -> None:
    x = latents(2, 8, frames)
    found, expected = vocoder(x), StockToken2Wav(networks, small_voice()).vocoder(x)
    assert found.shape == (2, HOP * frames)
    assert (found - expected).abs().max() <= 1e-5
    assert expected.std() > 0.005 and expected.abs().max() < 0.9  # neither silent nor saturated


@pytest.mark.parametrize(("kernels", "frames"), [(native, 7), (CPU(), 31)], ids=["native", "by Winograd's way"])
def test_a_stage_of_the_real_size_as_the_plain_formulation(kernels: Kernels, frames: int) -> None:
    """The first stage: 1536 to 768 channels, rate 5."""
    real = replace(FULL.vocoder, upsample_rates=(5,), upsample_kernel_sizes=(10,))
    networks = random_token2wav(replace(SMALL, vocoder=real), kernels)
    x = latents(1, 1536, frames)
    stream = Stream()
    stream.ends = True
    found = networks.vocoder.stages[0](x, networks.vocoder.filters, stream)
    expected = StockToken2Wav(networks, small_voice()).stage(0, 5, x)
    assert found.shape == (1, 768, 5 * frames)
    assert (found - expected).abs().max() <= 1e-5 * expected.std()  # of a sum over 768 channels


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_cuts_give_the_same_samples(vocoder: BigVGAN, data: st.DataObject) -> None:
    frames = data.draw(st.integers(1, 60))
    cuts = sorted(data.draw(st.lists(st.integers(0, frames), max_size=6)))
    x = latents(1, 8, frames)
    with torch.inference_mode():
        assert (in_pieces(vocoder, x, cuts) - vocoder(x)).abs().max() <= 1e-5


def test_products_of_bfloat16(networks, vocoder: BigVGAN) -> None:
    """At most twice as far from float32 as PyTorch's bfloat16, and in pieces no farther than at once."""
    narrow = recast(networks, native, SpeechDtypes(vocoder=torch.bfloat16)).vocoder
    plain = recast(networks, native, SpeechDtypes()).vocoder.to(torch.bfloat16)
    x = latents(2, 8, 140)
    expected = vocoder(x)

    def error(found: Tensor) -> float:
        return float((found.float() - expected).norm() / expected.norm())

    assert error(narrow(x)) <= 2 * error(plain(x.bfloat16()))
    assert error(in_pieces(narrow, x, [1, 17, 60])) <= 1.1 * error(narrow(x))
    computed = native.product_dtype(torch.bfloat16, x.device)
    assert (error(narrow(x)) > 1e-4) == (computed == torch.bfloat16)
    assert error(narrow(x)) < 0.02
    assert {c.weight.dtype for c in narrow.modules() if isinstance(c, StreamConv1d)} == {torch.float32, computed}


def test_single_frames(vocoder: BigVGAN) -> None:
    x = latents(1, 8, 40)
    assert (in_pieces(vocoder, x, list(range(1, 40))) - vocoder(x)).abs().max() <= 1e-5


def test_long_replies_are_cut_alike(vocoder: BigVGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    x = latents(1, 8, 150)
    whole = vocoder(x)
    monkeypatch.setitem(bigvgan.PIECE_FRAMES, "cpu", 37)
    pieces = list(vocoder.pieces(x, Stream(), ends=True))
    assert len(pieces) == 5
    assert (torch.cat(pieces, -1) - whole).abs().max() <= 1e-5
    assert torch.equal(vocoder(x), torch.cat(pieces, -1))


def test_samples_come_as_soon_as_they_are_decided(vocoder: BigVGAN) -> None:
    """The look-ahead that is added up from the layers is the one that the samples really have."""
    x = latents(1, 8, 40)
    stream, ready = Stream(), 0
    for frame in range(40):
        ready += vocoder.step(x[..., frame : frame + 1], stream, ends=False).shape[-1]
        assert ready == vocoder.samples_ready(frame + 1)
    decided = vocoder.samples_ready(30)
    assert decided == HOP * 30 - 3095  # 12.9 frames: the count for the published network
    x[..., 30:] = torch.nan  # reaches every sample that depends on it, however little
    assert int(vocoder(x)[0].isnan().nonzero()[0]) == decided


def test_memory_is_bounded_by_the_piece(vocoder: BigVGAN) -> None:
    stream, kept = Stream(), []
    for _ in range(3):
        vocoder.step(latents(1, 8, 40), stream, ends=False)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in stream._kept.values()))
    assert kept[0] == kept[1] == kept[2]
    assert kept[0] < 2**20
