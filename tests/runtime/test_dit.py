"""The velocity network against a plain formulation of it, at the real sizes and small; its precision and its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from random_networks import FULL, random_token2wav, random_voice
from runtime.speech_sizes import SMALL, small_token2wav, small_voice
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from covo_npu.kernels import native
from covo_npu.runtime.checkpoint.config import Token2WavConfig, VoiceConfig
from covo_npu.runtime.networks.dit import TimeModulation
from covo_npu.runtime.token2wav import SpeechDtypes, Token2Wav
from covo_npu.runtime.voice import Voice
from covo_npu.tools.bench.stock_token2wav import StockToken2Wav
from covo_npu.tools.speech import recast

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


def velocities(networks: Token2Wav, voice: Voice, codes: Tensor, z: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Return ours and the plain one, both [2, L, Z]."""
    dit, stock = networks.dit, StockToken2Wav(networks, voice)
    conditions = dit.conditions(codes, voice.prompt_latents)
    (modulation,) = dit.modulations([time], voice.speaker_embedding)
    ours = dit(z, conditions, modulation)
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
    networks, voice = random_token2wav(config, native), random_voice(config)
    codes = torch.arange(9)
    z = torch.randn(36, config.dit.latent_dim)
    ours, plain = velocities(networks, voice, codes, z, 0.3)
    assert relative(ours, plain) < 1e-5
    assert relative(ours[0], plain[1]) > 1e-2  # the rows differ: codes are only in the second
    later, _ = velocities(networks, voice, codes, z, 0.31)
    assert relative(later, plain) > 1e-5  # and the time matters


def test_all_times_at_once_are_each_time_alone() -> None:
    networks, voice = small_token2wav(), small_voice()
    times = [0.0, 0.3, 0.9]
    together = networks.dit.modulations(times, voice.speaker_embedding)
    assert len(together) == len(times)
    for time, found in zip(times, together, strict=True):
        (alone,) = networks.dit.modulations([time], voice.speaker_embedding)
        for a, b in zip(values(found), values(alone), strict=True):
            assert relative(a, b) < 1e-5  # float32 in another order; another time is off by 1e-3
    assert relative(values(together[0])[0], values(together[1])[0]) > 1e-3


def values(modulation: TimeModulation) -> list[Tensor]:
    branches = [branch for block in modulation.blocks for branch in (block.attention, block.feed_forward)]
    parts = [part for branch in branches for part in (branch.shift, branch.scale, branch.gate)]
    return [*parts, modulation.shift, modulation.scale]


def solved(networks: Token2Wav, voice: Voice, codes: Tensor, noise: Tensor) -> Tensor:
    return solution(networks, torch.cat((voice.prompt_codes, codes)), voice.prompt_latents, noise, voice)


def solution(networks: Token2Wav, *arguments: Any) -> Tensor:
    *_, latents = networks.solve(*arguments)
    return latents


def test_bfloat16_is_close_and_only_in_the_products() -> None:
    networks, voice = small_token2wav(), small_voice()
    narrow = recast(networks, native, SpeechDtypes(torch.bfloat16))
    codes, noise = torch.arange(30), torch.randn(140, 8)
    exact, half = (solved(each, voice, codes, noise) for each in (networks, narrow))
    assert half.dtype == torch.float32
    assert 1e-5 < relative(half, exact) < 2e-2
    names = {name for name, tensor in narrow.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert {name.rsplit(".", 2)[1] for name in names} == {"conv_embed", "qkv_proj", "o_proj", "fc1", "fc2"}
    assert narrow.dit.blocks[0].modulation.weight.dtype == torch.float32


def test_voices_side_by_side_do_not_meet() -> None:
    networks, voice = small_token2wav(), small_voice()
    other = Voice(voice.prompt_codes[:3], voice.prompt_latents[:13], torch.randn(16))
    codes, noise = torch.arange(30), torch.randn(140, 8)
    first = solved(networks, voice, codes, noise)
    second = solved(networks, other, codes, noise[: networks.num_frames(30, other)])
    assert second.shape[0] - first.shape[0] == 23 - 13 - 4 * 2
    assert torch.equal(solved(networks, voice, codes, noise), first)
    third = solved(networks, Voice(voice.prompt_codes, voice.prompt_latents, other.speaker_embedding), codes, noise)
    assert relative(third, first) > 1e-2


def test_solved_latents_may_stand_as_the_known_prefix() -> None:
    """What was solved is to the rest what a prompt is."""
    networks, voice = small_token2wav(), small_voice()
    codes, noise = torch.cat((voice.prompt_codes, torch.arange(20))), torch.randn(100, 8)
    first = solution(networks, codes[:15], voice.prompt_latents, noise[:60], voice)
    assert first.shape == (60 - 23, 8)
    known = torch.cat((voice.prompt_latents, first))
    second = solution(networks, codes, known, noise, voice)
    assert second.shape == (40, 8)
    # As a voice whose prompt is all of that, through the stock formulation.
    longer = StockToken2Wav(networks, Voice(codes[:15], known, voice.speaker_embedding))
    expected = longer.normalised_latents(codes[15:], noise)[60:]
    assert relative(second, expected) < 1e-4
    whole = solution(networks, codes, voice.prompt_latents, noise, voice)
    assert relative(whole[60 - 23 :], expected) > 1e-2


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
    networks, voice = small_token2wav(), small_voice()
    largest = []
    for num_codes in (550, 1100):
        conditions = networks.dit.conditions(torch.zeros(num_codes, dtype=torch.int64), voice.prompt_latents)
        (parts,) = networks.dit.modulations([0.5], voice.speaker_embedding)
        with Sizes() as sizes:
            result = networks.dit(torch.randn(4 * num_codes, 8), conditions, parts)
        assert result.shape == (2, 4 * num_codes, 8) and result.isfinite().all()
        largest.append(sizes.largest)
    assert largest[1] <= 2.1 * largest[0]
