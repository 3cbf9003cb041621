"""The velocity network against a plain formulation of it, at the real sizes and small; its precision and its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from runtime.speech_sizes import SMALL, small_token2wav
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from covo_npu.kernels import native
from covo_npu.runtime.config import Token2WavConfig, VoiceConfig
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.tools.random_speech import FULL, random_token2wav
from covo_npu.tools.stock_token2wav import StockToken2Wav

# One block of the real width, ragged lengths; the vocoder is not used.
ONE_BLOCK = replace(
    FULL,
    dit=replace(FULL.dit, num_layers=1, num_codes=32),
    vocoder=SMALL.vocoder,
    voice=VoiceConfig(num_codes=5, num_frames=23),
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def velocities(networks: Token2Wav, codes: Tensor, z: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Return ours and the plain one, both [2, L, Z]."""
    dit, voice, stock = networks.dit, networks.voice, StockToken2Wav(networks)
    conditions = dit.conditions(codes, voice.prompt_latents)
    ours = dit(z, conditions, dit.modulation(time, voice.speaker_embedding))
    tokens = stock._linear("token_proj", stock.dit["token_embedding.weight"][codes])
    upsampled = torch.zeros(tokens.shape[0] * 4 + 4, tokens.shape[1])  # transposed convolution, added up by hand
    for t, token in enumerate(tokens):
        upsampled[4 * t : 4 * t + 8] += torch.einsum("i,iok->ko", token, stock.dit["token_upsample.weight"])
    tokens = upsampled[2:-2] + stock.dit["token_upsample.bias"]
    known = torch.zeros_like(z)
    known[: voice.prompt_latents.shape[0]] = voice.prompt_latents
    both = torch.stack((torch.zeros_like(tokens), tokens))
    plain = stock.velocity(torch.full((2,), time), z.expand(2, -1, -1), both, known.expand(2, -1, -1))
    return ours, plain


@pytest.mark.parametrize("config", [SMALL, ONE_BLOCK], ids=["small", "one block of the real size"])
def test_velocity_as_the_plain_formulation(config: Token2WavConfig) -> None:
    networks = random_token2wav(config, native)
    codes = torch.arange(9)
    z = torch.randn(36, config.dit.latent_dim)
    ours, plain = velocities(networks, codes, z, 0.3)
    assert relative(ours, plain) < 1e-5
    assert relative(ours[0], plain[1]) > 1e-2  # the rows differ: codes are only in the second
    later, _ = velocities(networks, codes, z, 0.31)
    assert relative(later, plain) > 1e-5  # and the time matters


def test_bfloat16_is_close_and_only_in_the_products() -> None:
    networks = small_token2wav()
    codes, noise = torch.arange(30), torch.randn(140, 8)
    exact = networks.normalised_latents(codes, noise)
    networks.configure(torch.bfloat16)
    half = networks.normalised_latents(codes, noise)
    assert half.dtype == torch.float32
    assert 1e-5 < relative(half, exact) < 2e-2
    narrow = {name for name, tensor in networks.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert {name.rsplit(".", 2)[1] for name in narrow} == {"qkv_proj", "o_proj", "fc1", "fc2"}
    assert networks.dit.blocks[0].modulation.weight.dtype == torch.float32


def test_another_voice_after_the_cast() -> None:
    networks = small_token2wav()
    networks.configure(torch.bfloat16)
    codes, noise = torch.arange(30), torch.randn(140, 8)
    before = networks.normalised_latents(codes, noise)
    voice = {name: tensor.clone() for name, tensor in networks.voice.state_dict().items()}
    voice["speaker_embedding"] = torch.randn(16)
    networks.set_voice(voice)
    assert relative(networks.normalised_latents(codes, noise), before) > 1e-2


class Sizes(TorchDispatchMode):
    """Notes how many values the tensors have that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_memory_is_linear_in_the_length() -> None:
    """No tensor of an evaluation grows faster than the length, beyond 4096 frames too."""
    networks = small_token2wav()
    largest = []
    for num_codes in (550, 1100):
        conditions = networks.dit.conditions(torch.zeros(num_codes, dtype=torch.int64), networks.voice.prompt_latents)
        parts = networks.dit.modulation(0.5, networks.voice.speaker_embedding)
        with Sizes() as sizes:
            result = networks.dit(torch.randn(4 * num_codes, 8), conditions, parts)
        assert result.shape == (2, 4 * num_codes, 8) and result.isfinite().all()
        largest.append(sizes.largest)
    assert largest[1] <= 2.1 * largest[0]
