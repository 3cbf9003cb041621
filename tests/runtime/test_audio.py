"""Audio front end against upstream's goldens, and against definitions written here in float64."""

import math
import os
import stat
import wave
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covo_npu.runtime import audio
from covo_npu.runtime.audio import AudioError

DATA = Path(__file__).parents[1] / "data"
SHORT = ("question_en_48k_24bit", "question_zh_44k_stereo")
LONG = "long_16k_over30s"


@pytest.fixture(scope="module")
def mel_filters():
    return torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=400, n_mels=128))


def golden(name):
    return np.load(DATA / "golden" / f"frontend_{name}.npz")


def prepared(name):
    return audio.prepare(*audio.read_audio(DATA / "audio" / f"{name}.wav"))


def largest_difference(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


def sinc_resample(x, from_rate, to_rate):
    """Return the windowed-sinc interpolation of x, straight from its definition, in float64.

    y(n) = sum_k x[k] g(n / to_rate - k / from_rate), g(t) = c / from_rate * sinc(c t) * cos^2(pi c t / 12) where
    |c t| < 6, c = 0.99 times the lower rate (twice the cut-off frequency).
    """
    c = 0.99 * min(from_rate, to_rate)
    k = np.arange(len(x)) / from_rate
    y = np.zeros(math.ceil(len(x) * to_rate / from_rate))
    for n in range(len(y)):
        u = c * (n / to_rate - k)
        inside = np.abs(u) < 6
        y[n] = (x[inside] * np.sinc(u[inside]) * np.cos(np.pi * u[inside] / 12) ** 2).sum() * c / from_rate
    return y


def exact_log_mel(samples, filters, window=None):
    """Return Whisper's features of float64 samples by NumPy's FFT, in float64."""
    samples = np.pad(samples, (0, 480_000 - len(samples)))
    padded = np.pad(samples, 200, mode="reflect")
    window = np.hanning(401)[:-1] if window is None else window
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][:3000] * window
    mel = np.asarray(filters, np.float64) @ (np.abs(np.fft.rfft(frames)) ** 2).T
    logarithm = np.log10(np.maximum(mel, 1e-10))
    return (np.maximum(logarithm, logarithm.max() - 8) + 4) / 4


# Goldens


@pytest.mark.parametrize("name", SHORT)
def test_prepared_waveforms_are_upstreams(name):
    expected, waveform = golden(name), prepared(name)
    assert largest_difference(waveform, expected["wav24k"]) <= 1e-6
    assert largest_difference(audio.to_encoder_rate(waveform), expected["wav16k"].reshape(-1)) <= 1e-6


def test_a_long_waveform_is_upstreams_at_both_ends():
    expected, waveform = golden(LONG), prepared(LONG)
    last = audio.to_encoder_rate(audio.segments(waveform)[-1])
    first = audio.to_encoder_rate(audio.segments(waveform)[0])
    assert largest_difference(waveform[:2400], expected["wav24k_head"]) <= 1e-6
    assert largest_difference(waveform[-2400:], expected["wav24k_tail"]) <= 1e-6
    assert largest_difference(first[:1600], expected["wav16k_head"]) <= 1e-6
    assert largest_difference(last[-1600:], expected["wav16k_tail"]) <= 1e-6


@pytest.mark.parametrize("name", (*SHORT, LONG))
def test_mel_segments_and_placeholders_are_upstreams(name, mel_filters):
    expected, waveform = golden(name), prepared(name)
    mel = audio.features(waveform, mel_filters)
    assert mel.dtype == torch.float32 and mel.shape[1:] == (128, 3000)
    assert largest_difference(mel[:, :, :: int(expected["mel_stride"])], expected["mel"]) <= 1e-5
    assert [len(segment) for segment in audio.segments(waveform)] == expected["segment_lengths"].tolist()
    assert audio.num_placeholders(len(waveform)) == int(expected["num_placeholders"])


def test_the_golden_mel_notices_a_symmetric_window(mel_filters, monkeypatch):
    monkeypatch.setattr(
        audio, "fft_power", lambda frames: torch.fft.rfft(frames * torch.hann_window(400, False)).abs() ** 2
    )
    mel = audio.features(prepared(SHORT[0]), mel_filters)
    assert largest_difference(mel, golden(SHORT[0])["mel"]) > 1e-5


# Resampling


@pytest.mark.parametrize(
    ("from_rate", "to_rate"),
    [(48000, 24000), (44100, 24000), (16000, 24000), (24000, 16000), (8000, 24000), (11025, 24000), (22050, 24000),
     (192000, 24000), (44101, 24000), (23999, 24000), (999_983, 24000), (1000, 24000)],
)  # fmt: skip
def test_resample_is_the_definition(from_rate, to_rate):
    x = np.random.default_rng(0).uniform(-1, 1, min(3000, from_rate))
    expected = sinc_resample(x.astype(np.float32).astype(np.float64), from_rate, to_rate)
    found = audio.resample(torch.tensor(x, dtype=torch.float32), from_rate, to_rate, torch.float64)
    assert largest_difference(found, expected) <= 2e-6


def test_the_definition_notices_another_rolloff(monkeypatch):
    monkeypatch.setattr(audio, "SINC_ROLLOFF", 0.98)
    audio._dense_kernel.cache_clear()
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    found = audio.resample(x, 48000, 24000, torch.float64)
    audio._dense_kernel.cache_clear()
    assert largest_difference(found, sinc_resample(x.double().numpy(), 48000, 24000)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_to_resample_agree(dtype, monkeypatch):
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) - 0.5
    dense = audio.resample(x, 44100, 24000, dtype)
    monkeypatch.setattr(audio, "MAX_DENSE_TAPS", 0)
    assert largest_difference(audio.resample(x, 44100, 24000, dtype), dense) <= 1e-6


@pytest.mark.parametrize("dense_taps", [0, 1 << 20])
def test_resampling_in_blocks_changes_nothing(dense_taps, monkeypatch):
    monkeypatch.setattr(audio, "MAX_DENSE_TAPS", dense_taps)
    x = torch.rand(30_001, generator=torch.Generator().manual_seed(2)) - 0.5
    whole = audio.resample(x, 44100, 24000, torch.float32)
    monkeypatch.setattr(audio, "RESAMPLE_BLOCK", 1000)
    assert largest_difference(audio.resample(x, 44100, 24000, torch.float32), whole) <= 1e-7


def test_odd_rates_keep_the_kernel_small():
    kernel, starts, _ = audio._sparse_kernel(24000, 44101, torch.float32)
    assert kernel.numel() < 1_000_000 and starts.shape == (24000,)


@pytest.mark.parametrize("rate", [0, -1, 1_000_007, 2**31 - 1])
def test_an_absurd_rate_is_refused(rate):
    with pytest.raises(AudioError, match=f"audio: its sample rate of {rate} Hz is outside"):
        audio.prepare(torch.zeros(48000), rate)


# Framing and counting


@settings(deadline=None, max_examples=50)
@given(st.integers(240, 60_000))
def test_prepare_trims_to_10_ms_and_pads_to_20_ms(length):
    samples = torch.linspace(0.1, 1, length)
    waveform = audio.prepare(samples, 24_000)
    kept = length - length % 240
    assert len(waveform) % 480 == 0 and len(waveform) - kept in (0, 240)
    assert torch.equal(waveform[:kept], samples[:kept]) and not waveform[kept:].any()


def test_less_than_10_ms_is_refused():
    with pytest.raises(AudioError, match="at least 10 ms"):
        audio.prepare(torch.ones(239), 24_000)


@given(st.integers(1, 10_000_000))
def test_placeholders_cover_the_audio(num_samples):
    frames = num_samples * 100 // 24_000
    assert audio.num_placeholders(num_samples) == math.ceil(frames / 16)
    assert audio.num_placeholders(num_samples, adapter_layers=0) == math.ceil(frames / 2)


@given(st.integers(1, 5000))
def test_max_seconds_is_the_inverse_of_num_placeholders(placeholders):
    longest = round(audio.max_seconds(placeholders) * 24_000)
    assert audio.num_placeholders(longest) == placeholders
    assert audio.num_placeholders(longest + 480) == placeholders + 1


# log-mel


def test_both_transforms_are_the_exact_features(mel_filters):
    samples = audio.to_encoder_rate(prepared(SHORT[0]))
    exact = exact_log_mel(samples.double().numpy(), mel_filters)
    for transform in (audio.fft_power, audio.dft_power):
        mel = audio.log_mel(samples, mel_filters, transform)
        assert largest_difference(mel, exact) <= 1e-4  # float32 at 80 dB under the loudest bin
        assert np.abs(mel.numpy() - exact).mean() <= 1e-6
    wrong = exact_log_mel(samples.double().numpy(), mel_filters, window=np.hanning(400))
    assert largest_difference(mel, wrong) > 1e-3


def test_silence_and_overlong_samples(mel_filters):
    assert torch.equal(audio.log_mel(torch.zeros(10), mel_filters), torch.full((128, 3000), (-10 + 4) / 4))
    noise = torch.randn(500_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(audio.log_mel(noise, mel_filters), audio.log_mel(noise[:480_000], mel_filters))


# Reading


@pytest.mark.parametrize("form", ["wav-PCM_16", "wav-PCM_24", "wav-FLOAT", "wav-PCM_U8", "flac-PCM_16", "aiff-PCM_16"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_every_format_is_read_and_channels_are_averaged(tmp_path, form, channels):
    suffix, subtype = form.split("-")
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (2000, channels))
    soundfile.write(tmp_path / f"x.{suffix}", samples, 22_050, subtype=subtype)
    found, rate = audio.read_audio(tmp_path / f"x.{suffix}")
    assert rate == 22_050 and found.dtype == torch.float32
    assert largest_difference(found, samples.mean(1)) <= (0.01 if subtype == "PCM_U8" else 1e-4)


def bad_files(folder):
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("This is a text, not audio.\n" * 20)
    (folder / "headerless.raw").write_bytes(b"\0" * 4000)
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "none.wav", np.zeros(0), 24_000)
    soundfile.write(folder / "nan.wav", np.array([0.0, 0.1, np.nan, np.inf], np.float32), 24_000, subtype="FLOAT")
    whole = (DATA / "audio" / f"{SHORT[0]}.wav").read_bytes()
    (folder / "header.wav").write_bytes(whole[:30])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.wav", "does not exist"),
        ("empty.wav", r"is empty \(0 bytes\)"),
        ("text.wav", "is not an audio file that libsndfile can read"),
        ("header.wav", "is not an audio file that libsndfile can read"),
        ("headerless.raw", "is not an audio file that libsndfile can read"),
        ("folder.wav", "is a folder"),
        ("none.wav", "has no samples"),
        ("nan.wav", "2 of 4 samples are NaN or infinite, the first at 2"),
        ("text.wav/below", "Not a directory"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises(AudioError, match=message) as error:
        audio.read_audio(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_ends_early_gives_what_it_has(tmp_path):
    whole = (DATA / "audio" / f"{SHORT[0]}.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    complete, _ = audio.read_audio(DATA / "audio" / f"{SHORT[0]}.wav")
    found, _ = audio.read_audio(tmp_path / "cut.wav")
    assert 0 < len(found) < len(complete) and torch.equal(found, complete[: len(found)])


def test_too_long_is_refused_before_it_is_read(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(24_000 * 3), 24_000)
    assert len(audio.read_audio(tmp_path / "x.wav", max_seconds=3.0)[0]) == 72_000
    with pytest.raises(AudioError, match=r"lasts 3\.0 s, at most 2\.5 s are possible"):
        audio.read_audio(tmp_path / "x.wav", max_seconds=2.5)


def test_arrays_become_mono_float32():
    stereo = np.array([[0.5, -0.5], [1.0, 0.0]])
    assert audio.to_mono(stereo).tolist() == [0.0, 0.5]
    assert audio.to_mono(np.array([-32768, 16384], np.int16)).tolist() == [-1.0, 0.5]
    assert audio.to_mono(torch.tensor([0.25], dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 2, 2)), r"found shape \[2, 2, 2\]"),
        (np.float32(1.0), r"found shape \[\]"),
        (np.zeros((0, 2)), "has no samples"),
        (np.array(["a"]), "expected floating-point or signed integer samples"),
        (np.array([0.0, -np.inf]), "1 of 2 samples are NaN or infinite, the first at 1"),
    ],
)
def test_unusable_arrays_are_refused(samples, message):
    with pytest.raises(AudioError, match=message):
        audio.to_mono(samples)


# Writing


def test_write_wav_makes_16_bit_mono_at_24_khz(tmp_path):
    waveform = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0])
    audio.write_wav(tmp_path / "new" / "x.wav", waveform)
    with wave.open(str(tmp_path / "new" / "x.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        samples = np.frombuffer(file.readframes(7), "<i2")
    assert samples.tolist() == [0, 16384, -16384, 32767, -32767, 32767, -32767]
    assert os.listdir(tmp_path / "new") == ["x.wav"]
    readable = stat.S_IRUSR | stat.S_IWUSR
    assert (tmp_path / "new" / "x.wav").stat().st_mode & readable == readable


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    audio.write_wav(tmp_path / "x.wav", torch.zeros(10))
    before = (tmp_path / "x.wav").read_bytes()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wave.Wave_write, "writeframes", full)
    with pytest.raises(AudioError, match=r"x\.wav: cannot be written: No space left on device"):
        audio.write_wav(tmp_path / "x.wav", torch.ones(10))
    assert (tmp_path / "x.wav").read_bytes() == before and os.listdir(tmp_path) == ["x.wav"]


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match=r"cannot be written: .*; choose another folder"):
        audio.write_wav(tmp_path / "file" / "x.wav", torch.zeros(10))
