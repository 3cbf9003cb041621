"""Fixed contexts against the textbook: all frames at once, under a mask by which none sees a later segment."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runtime.speech_sizes import SMALL, small_token2wav, small_voice
from torch import Tensor

from covo_npu.runtime.context import MAX_PROMPTS, num_frames, without
from covo_npu.runtime.flow import Flow
from covo_npu.runtime.networks.dit import Rows
from covo_npu.runtime.options import WHOLE, SpeechBlocks
from covo_npu.runtime.speech import SpeechStream, drawn_noise
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.runtime.voice import Voice
from covo_npu.tools.bench.stock_token2wav import StockToken2Wav

Z, VOICE = SMALL.dit.latent_dim, small_voice()  # 5 codes, 23 frames: the last three belong to the reply's first code
FIXED = Flow(9, fixed_context=True)
PAST = SpeechBlocks((15, 15, 30), past_s=None)


class Textbook(StockToken2Wav):
    """The plain formulation, every frame of it in each evaluation. ends: of the segments, in frames."""

    def __init__(self, networks: Token2Wav, voice: Voice, ends: list[int]) -> None:
        super().__init__(networks, voice)
        self.pieces = list(zip([0, *ends], ends, strict=False))

    def _tokens(self, codes: Tensor) -> Tensor:
        return torch.cat([super(Textbook, self)._tokens(codes[: b // 4])[:, a:b] for a, b in self.pieces], 1)

    def _convolved(self, x: Tensor) -> Tensor:
        return torch.cat([super(Textbook, self)._convolved(x[:, :b])[:, a:b] for a, b in self.pieces], 1)

    def _bias(self, q: Tensor) -> Tensor:
        bias = super()._bias(q)
        for a, b in self.pieces:
            bias[:, :, a:b, b:] = -torch.inf
        return bias


def some_codes(count: int) -> list[int]:
    return torch.randint(SMALL.dit.num_codes, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@torch.inference_mode()
def textbook(networks: Token2Wav, codes: list[int], blocks: SpeechBlocks, seed: int) -> list[Tensor]:
    """Return the normalised latents of each block, from whole arrays."""
    every = torch.cat((VOICE.prompt_codes, torch.tensor(codes)))
    noise, fixed = drawn_noise(seed, Z)(4 * len(every)), 4 * VOICE.num_codes
    noise[:fixed] = drawn_noise(0, Z)(fixed)  # the prompt's is the same in all replies
    latents, known = VOICE.prompt_latents, VOICE.num_frames
    arrived, ends, found = VOICE.num_codes, [fixed], []
    for number in range(100):
        size = blocks.size(number)
        last = size is None or arrived + size > len(every)
        arrived = len(every) if last else arrived + (size or 0)
        voice = Voice(every[:0], latents, VOICE.speaker_embedding)
        solved = Textbook(networks, voice, [*ends, 4 * arrived]).normalised_latents(
            every[:arrived], noise[: 4 * arrived]
        )
        done = 4 * (arrived if last else arrived - blocks.look_ahead)
        found.append(solved[known:done])
        latents, known, ends = torch.cat((latents, solved[known:done])), done, [*ends, done]
        if last:
            break
    return found


class Heard:
    """Networks of speech, and the latents that they bring to sound."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.networks, self.latents = small_token2wav(), list[Tensor]()
        statistics = type(self.networks.statistics).forward

        def noted(module: Any, latents: Tensor) -> Tensor:
            self.latents.append(latents)
            return statistics(module, latents)

        monkeypatch.setattr(type(self.networks.statistics), "forward", noted)


def spoken(
    networks: Token2Wav, codes: list[int], blocks: SpeechBlocks, seed: int, flow: Flow = FIXED, voice: Voice = VOICE
) -> NDArray[np.float32]:
    stream = SpeechStream(networks, voice, drawn_noise(seed, Z), blocks, flow)
    return np.concatenate((stream.push(codes), stream.finish()))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("blocks", [WHOLE, PAST], ids=["whole", "in blocks"])
def test_as_the_textbook(blocks: SpeechBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, codes = Heard(monkeypatch), some_codes(80)
    spoken(heard.networks, codes, blocks, seed=11)
    found = heard.latents
    expected = textbook(heard.networks, codes, blocks, seed=11)
    assert len(found) == len(expected) == (1 if blocks is WHOLE else 4)
    for ours, plain in zip(found, expected, strict=True):
        assert relative(ours, plain) < 1e-4  # sums in another order, through 18 evaluations
    heard.latents = []
    spoken(heard.networks, codes, blocks, seed=11, flow=Flow(9))
    assert relative(torch.cat(heard.latents), torch.cat(expected)) > 1e-2  # it is something else, an approximation


def test_the_seed_is_heard_and_the_prompt_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, solved = small_token2wav(), list[int]()
    solve = type(networks).solve

    def noted(self: Token2Wav, codes: Tensor, *others: Any) -> Iterator[Tensor]:
        solved.append(len(codes))
        return solve(self, codes, *others)

    monkeypatch.setattr(type(networks), "solve", noted)
    flow, codes = Flow(1, "euler", fixed_context=True), some_codes(60)
    first = spoken(networks, codes, WHOLE, 1, flow)
    again = spoken(networks, codes, WHOLE, 1, flow)
    other = spoken(networks, codes, WHOLE, 2, flow)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert solved == [5, 60, 60, 60]
    solved.clear()
    spoken(networks, codes, SpeechBlocks((15, 15, 30), look_ahead=3), 1, flow)
    # a block's codes with those that were held back; before the next one what was spoken, by itself; never the prompt
    assert solved == [15, 12, 18, 15, 33, 30, 3]


@pytest.mark.parametrize("past_s", [0, 0.4, 6])
def test_what_is_too_long_ago_is_let_go(past_s: float) -> None:
    networks, blocks = small_token2wav(), SpeechBlocks((20,), look_ahead=2, past_s=past_s)
    stream = SpeechStream(networks, VOICE, drawn_noise(0, Z), blocks, Flow(1, "euler", fixed_context=True))
    for _ in range(15):
        stream.push(some_codes(20))
        frames = sum(map(num_frames, stream._fixed))
        assert frames == 4 * stream._num_fixed <= 4 * (5 + 25 * past_s)
        assert stream._num_fixed <= len(stream._codes) == min(len(stream._codes), 5 + 25 * past_s)


def segment(start: int, end: int) -> tuple[Rows, ...]:
    numbers = torch.arange(start, end).float()
    return (Rows(numbers[None, :, None].expand(2, -1, 3), (numbers[None, :, None, None].expand(4, -1, 2, 3),)),)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 3), (2, 5), (4, 9), (4, 7), (5, 30), (0, 30), (9, 12)])
def test_segments_without_some_frames(start: int, end: int) -> None:
    left = without([segment(0, 4), segment(4, 9), segment(9, 10)], start, end)
    expected = [number for number in range(10) if not start <= number < end]
    for values in ([x[0].inputs[0, :, 0] for x in left], [x[0].layers[0][0, :, 0, 0] for x in left]):
        assert [int(number) for piece in values for number in piece] == expected
    assert all(num_frames(piece) for piece in left)


def test_prompts_are_kept_by_what_they_are_and_not_all() -> None:
    networks, flow, codes = small_token2wav(), Flow(1, "euler", fixed_context=True), some_codes(9)
    voices = [Voice(VOICE.prompt_codes, VOICE.prompt_latents, VOICE.speaker_embedding * factor) for factor in range(4)]
    alone = [spoken(small_token2wav(), codes, WHOLE, 1, flow, voice) for voice in voices]
    with ThreadPoolExecutor(4) as pool:
        turns = [0, 1, 1, 2, 0, 3, 2, 1] * 2
        found = list(pool.map(lambda turn: spoken(networks, codes, WHOLE, 1, flow, voices[turn]), turns))
    assert all(np.array_equal(samples, alone[turn]) for samples, turn in zip(found, turns, strict=True))
    kept = networks.prompts._segments
    assert len(kept) == MAX_PROMPTS
    copy = Voice(*(x.clone() for x in (VOICE.prompt_codes, VOICE.prompt_latents, VOICE.speaker_embedding)))
    for voice in (voices[1], copy):  # other tensors of the same values
        spoken(networks, codes, WHOLE, 1, flow, voice)
    assert len({id(each) for each in kept.values()}) == MAX_PROMPTS
    before = list(kept)
    spoken(networks, codes, WHOLE, 1, flow, voices[1])
    assert list(kept) == before


def test_a_mask_would_be_missed() -> None:
    """The textbook itself: without its mask it is the usual reply."""
    networks, codes = small_token2wav(), some_codes(30)
    with torch.inference_mode():
        every = torch.cat((VOICE.prompt_codes, torch.tensor(codes)))
        noise = drawn_noise(1, Z)(4 * len(every))
        voice = Voice(every[:0], VOICE.prompt_latents, VOICE.speaker_embedding)
        whole = Textbook(networks, voice, [len(noise)]).normalised_latents(every, noise)
        *_, usual = networks.solve(every, VOICE.prompt_latents, noise, VOICE)
        masked = Textbook(networks, voice, [20, len(noise)]).normalised_latents(every, noise)
    assert relative(whole[23:], usual) < 1e-4 and relative(masked[23:], usual) > 1e-2
