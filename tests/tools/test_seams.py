"""The measure of seams: on signals whose seams are known, and on a smooth field whose blocks do not hear ahead."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from runtime.speech_sizes import SMALL, small_token2wav, small_voice
from torch import Tensor

from covo_npu.runtime.evaluations import Evaluations
from covo_npu.runtime.options import WHOLE, SpeechBlocks
from covo_npu.runtime.speech import SpeechStream, drawn_noise
from covo_npu.tools.check.seams import measure_seams, seams_at

RATE = 24_000


def noise(seed: int, samples: int = 2 * RATE) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


SEAMS = [9_000, 20_000, 33_000, 41_000]


def test_places_in_a_steady_signal_are_like_everywhere() -> None:
    """The mean of 16 jumps of a normal value scatters by 0.76 / 4 of itself: three times that is allowed."""
    for seed in range(5):
        found = measure_seams(noise(seed), range(4_000, 44_000, 2_500))
        assert found.count == 16 and 0.43 < found.energy < 1.57 and 0.8 < found.flux < 1.2


def test_a_jump_of_the_level_is_its_decibels() -> None:
    """6 dB up and down in noise whose windows of 480 values differ by 20 log10(e) / sqrt(480) dB on average."""
    samples, gain = noise(0), torch.ones(2 * RATE)
    for start, end in zip(SEAMS[::2], SEAMS[1::2]):
        gain[start:end] = 2.0
    found, usual = measure_seams(samples * gain, SEAMS), 20 / 2.302585 / 480**0.5 * (2 / torch.pi**0.5) / 2**0.5
    assert found.energy == pytest.approx(6.02 / usual, rel=0.25)
    assert found.flux > 1.15


def test_a_change_of_the_spectrum_is_seen_where_the_level_stays() -> None:
    """Low tones before, high ones after, of one level."""
    time = torch.arange(2 * RATE) / RATE
    low, high = ((2 * torch.pi * tone * time).sin() * 0.1 for tone in (300, 3000))
    is_low = torch.zeros(2 * RATE, dtype=torch.bool)
    is_low[SEAMS[0] : SEAMS[1]] = is_low[SEAMS[2] : SEAMS[3]] = True
    found = measure_seams(torch.where(is_low, low, high) + 0.1 * noise(1), SEAMS)
    assert found.flux > 2 and measure_seams(low + 0.1 * noise(1), SEAMS).flux < 1.3


def test_where_nothing_can_be_compared_there_are_no_seams() -> None:
    assert str(measure_seams(noise(0), [])) == "no seams"
    assert str(measure_seams(noise(0), [0, 2 * RATE])) == "no seams"
    assert str(measure_seams(noise(0, 100), [50])) == "no seams"


@pytest.mark.parametrize("blocks", [SpeechBlocks(), SpeechBlocks((7,), look_ahead=0), SpeechBlocks((5, 9), 2), WHOLE])
@pytest.mark.parametrize("num_codes", [1, 15, 16, 100])
def test_seams_are_where_blocks_end(blocks: SpeechBlocks, num_codes: int) -> None:
    """As the stream itself hands its latents to the vocoder."""
    networks, voice, lengths = small_token2wav(), small_voice(), []

    def solve(codes: Tensor, known: Tensor, noise: Tensor, *more: object) -> list[Tensor]:
        return [noise[len(known) :]]

    def statistics(latents: Tensor) -> Tensor:
        lengths.append(len(latents))
        return latents

    networks.solve = solve  # type: ignore[method-assign, assignment]
    networks.statistics.forward = statistics  # type: ignore[method-assign]
    stream = SpeechStream(networks, voice, drawn_noise(0, SMALL.dit.latent_dim), blocks)
    stream.push([1] * num_codes)
    stream.finish()
    ends = [240 * frames for frames in accumulate(length for length in lengths if length)]
    assert seams_at(blocks, num_codes, 4, voice.num_frames - 4 * voice.num_codes) == ends[:-1]


class SmoothField:
    """A field whose latents go to what their neighbours up to REACH frames away say; at an end only one side speaks."""

    REACH = 8

    def __init__(self) -> None:
        self.table = 0.3 * torch.randn(SMALL.dit.num_codes, SMALL.dit.latent_dim, generator=torch.manual_seed(0))

    def conditions(self, codes: Tensor, known_latents: Tensor, last_code: None, start: int) -> Tensor:
        assert last_code is None and start == 0, "nothing is fixed"
        frames = self.table[codes].repeat_interleave(4, 0)
        taps = torch.hann_window(2 * self.REACH + 1, periodic=False)[:, None]
        padded = torch.nn.functional.pad(frames, (0, 0, self.REACH, self.REACH))
        return torch.stack([(padded[i : i + len(taps)] * taps).sum(0) for i in range(len(frames))])

    def modulations(self, times: list[float], speaker: Tensor) -> list[float]:
        return times

    def __call__(self, latents: Tensor, conditions: Tensor, time: float) -> Tensor:
        velocity = (conditions - latents) / max(1 - time, 0.1)
        return torch.stack((velocity, velocity))


def test_a_smooth_field_shows_what_look_ahead_is_for() -> None:
    """Blocks that end where they know nothing have seams; with a look-ahead of the field's reach they have none."""
    networks, voice = small_token2wav(), small_voice()
    field = SmoothField()
    object.__setattr__(networks, "dit", field)
    networks.evaluations = Evaluations(field)  # type: ignore[arg-type]
    codes = torch.randint(SMALL.dit.num_codes, (240,), generator=torch.Generator().manual_seed(1)).tolist()
    found = {}
    for look_ahead in (0, 2):
        blocks = SpeechBlocks((12,), look_ahead, past_s=1)
        stream, latents = SpeechStream(networks, voice, drawn_noise(0, SMALL.dit.latent_dim), blocks), []
        networks.statistics.forward = lambda part, latents=latents: latents.append(part) or part  # type: ignore
        stream.push(codes)
        stream.finish()
        carrier = noise(2, 240 * sum(map(len, latents)))
        level = (torch.cat(latents).mean(1) * 4).exp().repeat_interleave(240)  # a sound whose loudness is a latent
        at = seams_at(blocks, len(codes), 4, voice.num_frames - 4 * voice.num_codes)
        found[look_ahead] = measure_seams(carrier * level, at)
    assert (found[0].count, found[2].count) == (19, 20)  # the held codes are a block of their own
    assert found[0].energy > 1.3 * found[2].energy and 0.6 < found[2].energy < 1.5
