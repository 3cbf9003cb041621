"""Speech block by block: what is spoken, from what it is solved, and that it does not depend on how codes arrive."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from runtime.speech_sizes import SMALL, random_token2wav, small_token2wav, small_voice
from torch import Tensor

from covo_npu.kernels import native
from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import speech
from covo_npu.runtime.evaluations import Evaluations
from covo_npu.runtime.flow import Flow
from covo_npu.runtime.options import WHOLE, SpeechBlocks
from covo_npu.runtime.speech import SpeechStream, drawn_noise, given_noise
from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.runtime.voice import Voice, no_voice
from covo_npu.tools.bench.stock_token2wav import StockToken2Wav

COUNTS = (1, 14, 15, 16, 31, 200)
# Of the vocoder one stage, so that a test of many blocks takes no longer than one of a whole reply: 3 samples a frame.
FAST = replace(SMALL, vocoder=replace(SMALL.vocoder, upsample_rates=(3,), upsample_kernel_sizes=(6,)))
Z, HOP = SMALL.dit.latent_dim, 3
PLANS = {
    "default": SpeechBlocks(),
    "no look-ahead": SpeechBlocks(look_ahead=0),
    "little past": SpeechBlocks((5, 9), look_ahead=2, past_s=0.4),
    "no past": SpeechBlocks((15,), look_ahead=3, past_s=0),
    "little prompt": SpeechBlocks(prompt_s=0.08, past_s=1),
    "no prompt": SpeechBlocks((20, 40), prompt_s=0),
    "code by code": SpeechBlocks((4, 1), look_ahead=3, past_s=0.2),
}
MANY = ("default", "no look-ahead", "little past")  # the plans of which long replies are spoken, too
CASES = [(count, plan) for plan in PLANS for count in COUNTS if count < 200 or plan in MANY]


@pytest.fixture(scope="module")
def networks() -> Token2Wav:
    return random_token2wav(FAST, native)


@pytest.fixture(scope="module")
def voice() -> Voice:
    return small_voice()


def some_codes(count: int) -> list[int]:
    return torch.randint(SMALL.dit.num_codes, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def spoken(stream: SpeechStream, codes: Sequence[int], cuts: Sequence[int] = ()) -> NDArray[np.float32]:
    pieces = [stream.push(codes[start:end]) for start, end in zip([0, *cuts], [*cuts, len(codes)])]
    return np.concatenate([*pieces, stream.finish()])


def stream(networks: Token2Wav, voice: Voice, blocks: SpeechBlocks = WHOLE, seed: int = 3, **more: Any) -> SpeechStream:
    return SpeechStream(networks, voice, drawn_noise(seed, Z), blocks, **more)


# --- noise


@pytest.mark.parametrize("latent_dim", [4, 8, 64])
def test_noise_in_pieces_is_one_draw(latent_dim: int) -> None:
    whole = torch.randn(1, 1164, latent_dim, generator=torch.Generator().manual_seed(5))[0]
    draw = drawn_noise(5, latent_dim)
    pieces = torch.cat([draw(frames) for frames in (4, 0, 60, 60, 1040)])
    assert torch.equal(pieces, whole)


# --- one block


@pytest.mark.parametrize("count", COUNTS)
def test_one_block_is_the_whole_reply_bit_for_bit(voice: Voice, count: int) -> None:
    """The whole: all noise in one draw, the ODE once, the vocoder at once."""
    networks, codes = small_token2wav(), some_codes(count)
    noise = torch.randn(networks.num_frames(count, voice), Z, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        every = torch.cat((voice.prompt_codes, torch.tensor(codes)))
        *_, latents = networks.solve(every, voice.prompt_latents, noise, voice)
        expected = networks.vocoder(networks.statistics(latents).T[None])[0].numpy()
    assert expected.shape == (240 * (4 * count - 3),)
    assert np.array_equal(spoken(stream(networks, voice), codes, cuts=[count // 3, count // 2]), expected)
    huge = SpeechBlocks((1000,))
    assert np.array_equal(spoken(stream(networks, voice, huge), codes), expected)
    assert np.array_equal(spoken(SpeechStream(networks, voice, given_noise(noise)), codes), expected)


# --- many blocks


class PointwiseDiT:
    """A field that sees of a frame its code, its place in the code, its latents and the time: blocks change nothing."""

    def conditions(self, codes: Tensor, *others: object) -> Tensor:
        frames = torch.stack([codes + 0.1 * place for place in range(4)], 1).flatten()
        return torch.sin(frames[:, None] * torch.arange(1, Z + 1) * 0.7)

    def modulations(self, times: Sequence[float], speaker: Tensor) -> list[float]:
        return list(times)

    def __call__(self, latents: Tensor, conditions: Tensor, time: float) -> Tensor:
        velocity = conditions - time * latents
        return torch.stack((velocity, velocity + 0.1 * latents.sin()))


@pytest.fixture(scope="module")
def pointwise() -> Token2Wav:
    networks = random_token2wav(FAST, native)
    del networks.dit
    object.__setattr__(networks, "dit", PointwiseDiT())
    networks.evaluations = Evaluations(networks.dit)
    return networks


@pytest.mark.parametrize(("count", "plan"), CASES)
def test_every_code_is_spoken_once_in_its_place(pointwise: Token2Wav, voice: Voice, count: int, plan: str) -> None:
    """Where blocks change nothing, samples streamed are the samples of the whole: the same codes met the same noise."""
    codes = some_codes(count)
    whole = spoken(stream(pointwise, voice), codes)
    found = spoken(stream(pointwise, voice, PLANS[plan]), codes, cuts=[1])
    assert found.shape == whole.shape == (HOP * (4 * count - 3),)
    assert np.abs(found - whole).max() <= 1e-5  # the vocoder's pieces: sums in another order
    other = list(codes)
    other[count // 2] = (other[count // 2] + 1) % SMALL.dit.num_codes
    assert np.abs(spoken(stream(pointwise, voice, PLANS[plan]), other) - whole).max() > 1e-3


@pytest.mark.parametrize(("count", "plan"), CASES)
def test_any_cutting_of_the_pushes_gives_the_same_samples(
    networks: Token2Wav, voice: Voice, count: int, plan: str
) -> None:
    codes, flow = some_codes(count), Flow(1, "euler")
    at_once = spoken(stream(networks, voice, PLANS[plan], flow=flow), codes)
    assert at_once.shape == (HOP * (4 * count - 3),)
    one_by_one = spoken(stream(networks, voice, PLANS[plan], flow=flow), codes, cuts=range(1, count))
    assert np.array_equal(one_by_one, at_once)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_plan_and_any_cutting(networks: Token2Wav, voice: Voice, data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)))
    blocks = SpeechBlocks(
        sizes,
        look_ahead=data.draw(st.integers(0, sizes[0] - 1)),
        past_s=data.draw(st.sampled_from([None, 0, 0.1, 2])),
        prompt_s=data.draw(st.sampled_from([None, 0, 0.1])),
    )
    count = data.draw(st.integers(0, 60))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    codes, flow = some_codes(count), Flow(1, "euler", fixed_context=data.draw(st.booleans()))
    found = spoken(stream(networks, voice, blocks, flow=flow), codes, cuts)
    assert found.shape == (max(0, HOP * (4 * count - 3)),) and np.isfinite(found).all()
    assert np.array_equal(found, spoken(stream(networks, voice, blocks, flow=flow), codes))


def one_shot(networks: Token2Wav, voice: Voice, codes: list[int], blocks: SpeechBlocks, seed: int) -> list[Tensor]:
    """Return the normalised latents of each block, by the definition and through the stock formulation of the networks.

    Everything is looked up in whole arrays by absolute frame; nothing is carried from block to block but the latents.
    """
    every = voice.prompt_codes.tolist() + codes
    noise = torch.randn(4 * len(every), Z, generator=torch.Generator().manual_seed(seed))
    prompt = len(voice.prompt_codes)
    first = 0 if blocks.prompt_s is None else max(0, prompt - round(25 * blocks.prompt_s))
    latents = torch.zeros(4 * len(every), Z)
    latents[: len(voice.prompt_latents)] = voice.prompt_latents
    done, arrived, known, found = prompt, prompt, len(voice.prompt_latents), []
    for number in range(1000):
        size = blocks.sizes[min(number, len(blocks.sizes) - 1)]
        last = arrived + size > len(every)
        arrived = len(every) if last else arrived + size
        oldest = prompt if blocks.past_s is None else max(prompt, done - round(25 * blocks.past_s))
        kept = [*range(first, prompt), *range(oldest, done)]
        frames = [4 * code + place for code in (*kept, *range(done, arrived)) for place in range(4)]
        before = [frame for frame in frames if frame < known]
        before_codes = torch.tensor([every[code] for code in kept], dtype=torch.int64)
        plain = StockToken2Wav(networks, Voice(before_codes, latents[before], voice.speaker_embedding))
        solved = plain.normalised_latents(torch.tensor(every[done:arrived]), noise[frames])
        done = arrived if last else arrived - blocks.look_ahead
        latents[known : 4 * done] = solved[len(before) : len(before) + 4 * done - known]
        found.append(latents[known : 4 * done].clone())
        known = 4 * done
        if last:
            return found
    raise AssertionError("no end")


@pytest.mark.parametrize("plan", ["default", "little past", "little prompt", "no prompt"])
def test_a_block_is_the_one_shot_function_of_what_is_known(
    voice: Voice, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, codes, blocks, found = small_token2wav(), some_codes(100), PLANS[plan], []
    statistics = type(networks.statistics).forward
    monkeypatch.setattr(
        type(networks.statistics), "forward", lambda self, latents: found.append(latents) or statistics(self, latents)
    )
    samples = spoken(stream(networks, voice, blocks, seed=11), codes)
    with torch.inference_mode():
        expected = one_shot(networks, voice, codes, blocks, seed=11)
        assert [len(block) for block in found] == [len(block) for block in expected] and len(found) > 2
        for ours, plain in zip(found, expected, strict=True):
            assert float((ours - plain).norm() / plain.norm()) < 1e-4
        plain = StockToken2Wav(networks, voice).vocoder(networks.statistics(torch.cat(expected)).T[None])[0].numpy()
    assert np.abs(samples - plain).max() <= 1e-3 * np.abs(plain).max()
    whole = spoken(stream(networks, voice, seed=11), codes)
    assert np.abs(samples - whole).max() > 1e-2 * np.abs(whole).max()  # blocks do hear something else


# --- what a block sees


class Lengths:
    """Notes how many frames are solved at a time, in place of solving them."""

    def __init__(self, networks: Token2Wav, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames: list[int] = []
        self.known: list[int] = []

        def solve(codes: Tensor, known: Tensor, noise: Tensor, *others: object) -> Iterator[Tensor]:
            assert len(noise) == 4 * len(codes)
            self.frames.append(len(noise))
            self.known.append(len(known))
            yield noise[len(known) :]

        monkeypatch.setattr(networks, "solve", solve)


def test_sizes_and_look_ahead(networks: Token2Wav, voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = Lengths(networks, monkeypatch)
    blocks, ready = stream(networks, voice, SpeechBlocks((15, 15, 30, 60), look_ahead=3, past_s=None)), []
    for number, code in enumerate(some_codes(200), 1):
        before = len(lengths.frames)
        blocks.push([code])
        ready += [number] * (len(lengths.frames) - before)
    blocks.finish()
    assert ready == [15, 30, 60, 120, 180]  # as soon as the codes are there: bursts of the model are 15
    assert lengths.frames == [4 * (5 + codes) for codes in (15, 30, 60, 120, 180, 200)]
    assert lengths.known == [23, *(4 * (5 + codes - 3) for codes in (15, 30, 60, 120, 180))]


def test_a_long_reply_costs_no_more_a_block(networks: Token2Wav, voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of a block and what is kept for the next are bounded, positions those of the network: 4096 at most."""
    lengths, blocks = Lengths(networks, monkeypatch), SpeechBlocks(past_s=6)
    speaker, kept = stream(networks, voice, blocks), []
    for _ in range(20):
        speaker.push(some_codes(60))
        kept.append(sum(x.untyped_storage().nbytes() for x in vars(speaker).values() if isinstance(x, Tensor)))
    assert max(lengths.frames) == 4 * (5 + 150 + 3 + 60) and set(lengths.frames[8:]) == {max(lengths.frames)}
    assert len(set(kept[5:])) == 1
    lengths.frames.clear()
    spoken(stream(networks, voice, SpeechBlocks(past_s=None)), some_codes(2300))
    assert sum(lengths.frames[:-1]) > 4 * 2300 and max(lengths.frames) == 4096


def test_the_longest_past_of_a_real_block_is_solved(networks: Token2Wav, voice: Voice) -> None:
    """A reply beyond 4096 frames, through the network."""
    found = spoken(stream(networks, voice, SpeechBlocks((300,), past_s=None), flow=Flow(1, "euler")), some_codes(1200))
    assert found.shape == (HOP * (4 * 1200 - 3),) and np.isfinite(found).all()


@pytest.mark.parametrize("frames", [0, 1, 11, 20, 23])
@pytest.mark.parametrize("prompt_s", [None, 0, 0.12, 1])
def test_prompts_of_any_length_are_cut_once(pointwise: Token2Wav, frames: int, prompt_s: float | None) -> None:
    """Frames that prompt codes lack are the reply's; however little of the prompt is used, nothing else is spoken."""
    full = small_voice()
    voice = Voice(full.prompt_codes, full.prompt_latents[:frames], full.speaker_embedding)
    codes = some_codes(40)
    whole = spoken(stream(pointwise, voice), codes)
    assert whole.shape == (HOP * (4 * 45 - frames),)
    found = spoken(stream(pointwise, voice, SpeechBlocks(prompt_s=prompt_s)), codes)
    assert found.shape == whole.shape and np.abs(found - whole).max() <= 1e-5


def test_without_a_voice(networks: Token2Wav) -> None:
    assert spoken(stream(networks, no_voice(SMALL.dit), SpeechBlocks()), some_codes(20)).shape == (HOP * 80,)


# --- streams among themselves


def test_seeds_and_voices_are_heard(networks: Token2Wav, voice: Voice) -> None:
    codes = some_codes(31)
    other = Voice(voice.prompt_codes, voice.prompt_latents, -voice.speaker_embedding)
    first = spoken(stream(networks, voice, SpeechBlocks()), codes)
    assert np.array_equal(first, spoken(stream(networks, voice, SpeechBlocks()), codes))
    for different in (stream(networks, voice, SpeechBlocks(), seed=4), stream(networks, other, SpeechBlocks())):
        assert np.abs(spoken(different, codes) - first).max() > 1e-3


def test_streams_in_threads_do_not_disturb_each_other(networks: Token2Wav, voice: Voice) -> None:
    other = Voice(voice.prompt_codes[:3], voice.prompt_latents[:13], -voice.speaker_embedding)
    wanted = [(voice, SpeechBlocks(), 1), (other, SpeechBlocks(past_s=1), 2), (voice, WHOLE, 3), (voice, WHOLE, 1)] * 2
    codes = some_codes(70)

    def alone(who: Voice, blocks: SpeechBlocks, seed: int) -> NDArray[np.float32]:
        return spoken(stream(networks, who, blocks, seed), codes, cuts=range(7, 70, 7))

    expected = [alone(*each) for each in wanted]
    with ThreadPoolExecutor(4) as pool:
        for found, each in zip(pool.map(lambda each: alone(*each), wanted), expected, strict=True):
            assert np.array_equal(found, each)


def test_streams_that_take_turns_by_pieces_of_work(networks: Token2Wav, voice: Voice) -> None:
    codes = some_codes(45)
    expected = [spoken(stream(networks, voice, SpeechBlocks(), seed), codes) for seed in (1, 2)]
    streams, found = [stream(networks, voice, SpeechBlocks(), seed) for seed in (1, 2)], ([], [])

    def work(each: SpeechStream) -> Iterator[Tensor]:
        while each.ready:
            yield from each.work()

    for each in streams:
        each.take(codes)
        each.end()
    with torch.inference_mode():
        turns = [work(each) for each in streams]
        while not all(each.over for each in streams):
            for turn, pieces in zip(turns, found):
                pieces += [samples.numpy() for _, samples in zip(range(1), turn)]
        for turn, pieces in zip(turns, found):
            pieces += [samples.numpy() for samples in turn]
    for pieces, whole in zip(found, expected, strict=True):
        assert np.array_equal(np.concatenate(pieces), whole)


def test_work_comes_in_small_pieces_and_leaving_it_frees_all(networks: Token2Wav, voice: Voice) -> None:
    seen: list[tuple[str, int, int]] = []
    speaker = stream(networks, voice, on_progress=lambda *step: seen.append(step))
    speaker.take(some_codes(200))
    speaker.end()
    with torch.inference_mode():
        sizes = [samples.numel() for samples in speaker.work()]
    assert sizes[:18] == [0] * 18 and all(sizes[18:]) and sum(sizes) == HOP * 797
    pieces = math.ceil(797 / 128)
    assert seen == [("flow matching", n, 18) for n in range(1, 19)] + [("vocoder", n, pieces) for n in range(1, 8)]
    speaker = stream(networks, voice)
    speaker.take(some_codes(200))
    speaker.end()
    with torch.inference_mode():
        turn = speaker.work()
        next(turn)
        held = [weakref.ref(each) for each in gc.get_objects() if type(each) is Tensor and each.shape[-2:-1] == (820,)]
        assert held
        del turn, speaker
        gc.collect()
    assert not [each for each in held if each() is not None]


# --- faults


def test_a_code_outside_the_table_ends_the_stream(networks: Token2Wav, voice: Voice) -> None:
    codes = some_codes(40)
    good, bad = (stream(networks, voice, SpeechBlocks()) for _ in range(2))
    expected = good.push(codes[:30])
    assert np.array_equal(bad.push(codes[:30]), expected) and expected.size
    with pytest.raises(CovoError, match=r"audio codes must be in 0\.\.39, found \[-1, 40\]"):
        bad.push([1, 40, -1, *codes])
    with pytest.raises(CovoError, match="has ended"):
        bad.push([1])
    assert not bad.finish().size and bad.over
    assert good.finish().size


def test_a_finished_stream_takes_nothing(networks: Token2Wav, voice: Voice) -> None:
    speaker = stream(networks, voice, SpeechBlocks())
    assert not speaker.push([]).size and not speaker.finish().size
    with pytest.raises(CovoError, match="has ended"):
        speaker.push([1])
    assert not speaker.finish().size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": (15, 0)}, r"sizes must be at least 1 each, found \(15, 0\)"),
        ({"sizes": (3,)}, "look_ahead must be at least 0 and below the first size, found 3"),
        ({"look_ahead": -1, "past_s": -1.0}, "look_ahead must be .*; past_s must be at least 0"),
        ({"prompt_s": float("nan")}, "prompt_s must be at least 0"),
    ],
)
def test_impossible_blocks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeechBlocks(**fields)


def test_nothing_sounds_before_the_weights_are_verified(networks: Token2Wav, voice: Voice) -> None:
    def damaged() -> None:
        raise CovoError("damaged")

    speaker = stream(networks, voice, SpeechBlocks(), before_sound=damaged)
    speaker.push(some_codes(14))
    with pytest.raises(CovoError, match="damaged"):
        speaker.push([1])


def test_the_model_of_a_checkpoint_streams(convert_tiny: Any, device: str) -> None:
    from covo_npu.runtime import CovoAudio

    model = CovoAudio.load(convert_tiny("float32"), device=device, token2wav_dtype="float32")
    codes = [(7 * i) % 64 for i in range(40)]
    whole, blocks = model.token2wav(codes, seed=2), model.token2wav(codes, seed=2, blocks=SpeechBlocks())
    assert whole.shape == blocks.shape and not np.array_equal(whole, blocks)
    assert np.array_equal(spoken(model.speech_stream(SpeechBlocks(), 2), codes, cuts=[3, 33]), blocks)
    assert np.array_equal(model.token2wav(np.array(codes), seed=2, blocks=SpeechBlocks()), blocks)
    mixed = model.speech_stream(SpeechBlocks(), 2)
    pieces = (mixed.push(codes[:3]), mixed.push(np.array(codes[3:])), mixed.finish())
    assert np.array_equal(np.concatenate(pieces), blocks)
    assert speech.MAX_FRAMES == 4096
