"""Pieces against the whole, G.711 against libsndfile's decoder."""

import io

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covo_npu.runtime.resampling import resample
from covo_npu.serve.resample import Resampler, g711, pcm16

RATES = [(a, b) for a in (8_000, 16_000, 24_000, 48_000) for b in (16_000, 24_000)]
# Each output is a sum of at most 40 products other than zero, whose magnitudes add up to less than 1.9 at full scale;
# two orders of summing differ by at most 40 roundings of float32 (2 ** -24) of that.
TOLERANCE = 40 * 1.9 * 2.0**-24


def pieces(signal, sizes):
    begin = 0
    for size in sizes:
        yield signal[begin : begin + size]
        begin += size
    yield signal[begin:]


def streamed(signal, from_rate, to_rate, sizes):
    resampler = Resampler(from_rate, to_rate)
    return np.concatenate([*map(resampler.push, pieces(signal, sizes)), resampler.flush()])


@pytest.mark.parametrize(("from_rate", "to_rate"), [*RATES, (44_100, 24_000)])
@settings(max_examples=25, deadline=None)
@given(length=st.integers(0, 4000), sizes=st.lists(st.integers(0, 1500), max_size=12), seed=st.integers(0, 99))
def test_pieces_are_the_whole(from_rate, to_rate, length, sizes, seed):
    signal = np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)
    whole = resample(torch.from_numpy(signal), from_rate, to_rate, torch.float32).numpy()
    found = streamed(signal, from_rate, to_rate, sizes)
    assert found.shape == whole.shape and found.dtype == np.float32
    assert np.abs(found - whole).max(initial=0) <= TOLERANCE


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_a_minute_in_frames_of_20_ms(from_rate, to_rate):
    signal = np.random.default_rng(3).uniform(-1, 1, 60 * from_rate).astype(np.float32)
    resampler, frame = Resampler(from_rate, to_rate), from_rate // 50
    out, lag_s = [], 0.0
    for begin in range(0, signal.size, frame):
        out.append(resampler.push(signal[begin : begin + frame]))
        lag_s = max(lag_s, (begin + frame) / from_rate - sum(map(len, out)) / to_rate)
        assert resampler._held.size < 3 * frame  # memory does not grow
    found = np.concatenate([*out, resampler.flush()])
    whole = resample(torch.from_numpy(signal), from_rate, to_rate, torch.float32).numpy()
    assert found.shape == whole.shape and np.abs(found - whole).max() <= TOLERANCE
    assert lag_s < 1.1e-3


@pytest.mark.parametrize(("from_rate", "to_rate"), [pair for pair in RATES if pair[0] != pair[1]])
def test_a_tone_is_that_of_another_resampler(from_rate, to_rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(from_rate) / from_rate).astype(np.float32)
    found = streamed(tone, from_rate, to_rate, [160] * 50)
    expected = soxr.resample(tone, from_rate, to_rate, "VHQ")
    inner = slice(to_rate // 10, -to_rate // 10)
    # Six zero crossings under a Hann window ripple by less than 0.2 % in the pass band.
    assert np.abs(found[inner] - expected[inner]).max() < 2e-3


def test_after_a_flush_it_begins_anew():
    signal = np.random.default_rng(1).uniform(-1, 1, 1000).astype(np.float32)
    resampler = Resampler(48_000, 24_000)
    first = np.concatenate([resampler.push(signal), resampler.flush()])
    assert resampler.flush().size == 0
    assert np.array_equal(np.concatenate([resampler.push(signal), resampler.flush()]), first)


@pytest.mark.parametrize(("law", "subtype"), [("pcmu", "ULAW"), ("pcma", "ALAW")])
def test_g711_is_that_of_libsndfile(law, subtype):
    codes = bytes(range(256))
    raw = {"samplerate": 8000, "channels": 1, "format": "RAW", "subtype": subtype}
    expected, _ = soundfile.read(io.BytesIO(codes), dtype="int16", **raw)
    assert np.array_equal(g711(codes, law) * 32768, expected)


def test_pcm16():
    assert pcm16(b"\x00\x80\xff\x7f\x00\x00\x01\x00").tolist() == [-1.0, 32767 / 32768, 0.0, 1 / 32768]
    with pytest.raises(ValueError, match="buffer size"):
        pcm16(b"\x00")
