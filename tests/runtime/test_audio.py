"""Audio front end against upstream's goldens, and against definitions written here in float64."""

import io
import math
import os
import stat
import subprocess
import sys
import wave
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covo_npu.runtime import audio, resampling, wav
from covo_npu.runtime.audio import AudioError

DATA = Path(__file__).parents[1] / "data"
SHORT = ("question_en_48k_24bit", "question_zh_44k_stereo")
LONG = "long_16k_over30s"
SAMPLES = 1e-6  # how far prepared and resampled waveforms may be from upstream's
SOUND = torch.sin(torch.arange(44100) * 0.05)


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


HANN = np.hanning(401)[:-1]


def spectra(samples, window=HANN):
    """Return the spectra [3000, 201] of float64 samples at 16 kHz: 30 s, centred frames of 400, hop 160."""
    padded = np.pad(np.pad(samples, (0, 480_000 - len(samples))), 200, mode="reflect")
    return np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][:3000] * window)


def mel_of(spectrum):
    """Return the power in librosa's mel bands [128, 3000]."""
    return librosa.filters.mel(sr=16_000, n_fft=400, n_mels=128).astype(np.float64) @ (np.abs(spectrum) ** 2).T


def features_of(mel):
    """Return Whisper's features [128, 3000] of the power in mel bands."""
    logarithm = np.log10(np.maximum(mel, 1e-10))
    return (np.maximum(logarithm, logarithm.max() - 8) + 4) / 4


def exact_log_mel(samples, window=HANN):
    """Return Whisper's features of float64 samples, in float64, straight from their definition."""
    return features_of(mel_of(spectra(samples, window)))


def float32_log_mel(samples, sample_error=0.0):
    """Return (lowest, highest) features that a right program in float32 may compute of samples that are so far off.

    A fast Fourier transform of n points errs by at most t h / (1 - t h) of the spectrum's 2-norm, t = log2 n,
    h = u + 4 u (sqrt 2 + u), u = 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, theorem 24.2); the
    windowed frame by 3 u of its own. So no bin is off by more than that, e. A mel band sum w |X|^2 is then off by
    2 e sqrt(sum w * band) + e^2 sum w at most, and by 205 u of itself from the square and the sum over 201 bins. The
    logarithm, up to 10 in size, and the sum after it are rounded to steps of 2**-20 and divided by 4.
    """
    u, t = 2.0**-24, math.log2(400)
    h = u + 4 * u * (math.sqrt(2) + u)
    spectrum = spectra(samples)
    whole = np.sqrt((np.abs(spectrum[:, [0, -1]]) ** 2).sum(1) + 2 * (np.abs(spectrum[:, 1:-1]) ** 2).sum(1))
    e = (t * h / (1 - t * h) + 3 * u) * whole + sample_error * HANN.sum()
    weights = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=128).astype(np.float64).sum(1)[:, None]
    mel = mel_of(spectrum)
    off = 2 * e * np.sqrt(weights * mel) + e**2 * weights + 205 * u * mel
    rounding = 2 * 2.0**-20 / 4
    return features_of(mel - off) - rounding, features_of(mel + off) + rounding


# Goldens


@pytest.mark.parametrize("name", SHORT)
def test_prepared_waveforms_are_upstreams(name):
    expected, waveform = golden(name), prepared(name)
    assert largest_difference(waveform, expected["wav24k"]) <= SAMPLES
    assert largest_difference(audio.to_encoder_rate(waveform), expected["wav16k"].reshape(-1)) <= SAMPLES


def test_a_long_waveform_is_upstreams_at_both_ends():
    expected, waveform = golden(LONG), prepared(LONG)
    last = audio.to_encoder_rate(audio.segments(waveform)[-1])
    first = audio.to_encoder_rate(audio.segments(waveform)[0])
    assert largest_difference(waveform[:2400], expected["wav24k_head"]) <= SAMPLES
    assert largest_difference(waveform[-2400:], expected["wav24k_tail"]) <= SAMPLES
    assert largest_difference(first[:1600], expected["wav16k_head"]) <= SAMPLES
    assert largest_difference(last[-1600:], expected["wav16k_tail"]) <= SAMPLES


@pytest.mark.parametrize("name", (*SHORT, LONG))
def test_mel_segments_and_placeholders_are_upstreams(name):
    expected, waveform = golden(name), prepared(name)
    mel, stride = audio.features(waveform).numpy(), int(expected["mel_stride"])
    assert mel.dtype == np.float32 and mel.shape[1:] == (128, 3000)
    for segment, found, upstreams in zip(audio.segments(waveform), mel, expected["mel"], strict=True):
        samples = audio.to_encoder_rate(segment).double().numpy()
        low, high = float32_log_mel(samples, SAMPLES)
        assert ((low[:, ::stride] <= upstreams) & (upstreams <= high[:, ::stride])).all()
        assert ((low <= found) & (found <= high)).all()
    assert [len(segment) for segment in audio.segments(waveform)] == expected["segment_lengths"].tolist()
    assert audio.num_placeholders(len(waveform)) == int(expected["num_placeholders"])


@pytest.mark.parametrize("name", SHORT)
def test_upstreams_samples_have_upstreams_mel(name):
    """Fed with the same samples, nothing but the rounding of upstream's float32 is between the two."""
    expected = golden(name)
    samples = expected["wav16k"].reshape(-1)
    low, high = float32_log_mel(samples.astype(np.float64))
    mel, upstreams = audio.log_mel(torch.from_numpy(samples)).numpy(), expected["mel"][0]
    assert ((low <= upstreams) & (upstreams <= high)).all()
    assert ((low <= mel) & (mel <= high)).all()
    for wrong in (
        exact_log_mel(samples, window=np.hanning(400)),  # symmetric
        exact_log_mel(samples, window=np.hanning(401)[1:]),  # one sample late
        exact_log_mel(samples[1:]),
        exact_log_mel(samples * (1 + 1e-4)),
        np.maximum(mel, mel.max() - 7 / 4),
    ):
        assert ((wrong < low) | (wrong > high)).mean() > 0.1


# Resampling


@pytest.mark.parametrize(
    ("from_rate", "to_rate"),
    [(48000, 24000), (44100, 24000), (16000, 24000), (24000, 16000), (8000, 24000), (11025, 24000), (22050, 24000),
     (192000, 24000), (44101, 24000), (23999, 24000), (999_983, 24000), (1000, 24000)],
)  # fmt: skip
def test_resample_is_the_definition(from_rate, to_rate):
    x = np.random.default_rng(0).uniform(-1, 1, min(3000, from_rate))
    expected = sinc_resample(x.astype(np.float32).astype(np.float64), from_rate, to_rate)
    found = resampling.resample(torch.tensor(x, dtype=torch.float32), from_rate, to_rate, torch.float64)
    assert largest_difference(found, expected) <= 2e-6


def test_the_definition_notices_another_rolloff(monkeypatch):
    monkeypatch.setattr(resampling, "SINC_ROLLOFF", 0.98)
    resampling._dense_kernel.cache_clear()
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    found = resampling.resample(x, 48000, 24000, torch.float64)
    resampling._dense_kernel.cache_clear()
    assert largest_difference(found, sinc_resample(x.double().numpy(), 48000, 24000)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_to_resample_agree(dtype, monkeypatch):
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) - 0.5
    dense = resampling.resample(x, 44100, 24000, dtype)
    monkeypatch.setattr(resampling, "MAX_DENSE_TAPS", 0)
    assert largest_difference(resampling.resample(x, 44100, 24000, dtype), dense) <= 1e-6


@pytest.mark.parametrize("dense_taps", [0, 1 << 20])
def test_resampling_in_blocks_changes_nothing(dense_taps, monkeypatch):
    monkeypatch.setattr(resampling, "MAX_DENSE_TAPS", dense_taps)
    x = torch.rand(30_001, generator=torch.Generator().manual_seed(2)) - 0.5
    whole = resampling.resample(x, 44100, 24000, torch.float32)
    monkeypatch.setattr(resampling, "RESAMPLE_BLOCK", 40_000)
    assert torch.equal(resampling.resample(x, 44100, 24000, torch.float32), whole)


def test_odd_rates_keep_the_kernel_small():
    kernel, starts, _ = resampling._sparse_kernel(24000, 44101, 24000, torch.float32)
    assert kernel.numel() < 1_000_000 and starts.shape == (24000,)


@pytest.mark.parametrize("rate", [0, -1, 1_000_007, 2**31 - 1])
def test_an_absurd_rate_is_refused(rate):
    with pytest.raises(AudioError, match=f"audio: its sample rate of {rate} Hz is outside"):
        audio.prepare(torch.zeros(48000), rate)


@pytest.mark.parametrize("rate", [44100.5, float("nan"), float("inf")])
def test_a_rate_that_is_no_whole_number_is_refused(rate):
    with pytest.raises(AudioError, match=f"audio: its sample rate of {rate} Hz is no whole number"):
        audio.prepare(torch.zeros(48000), rate)
    assert torch.equal(audio.prepare(SOUND, 44100.0), audio.prepare(SOUND, 44100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_samples_of_any_float_dtype_are_taken(dtype):
    assert torch.equal(audio.to_mono(SOUND.to(dtype)), SOUND.to(dtype).float())


def test_samples_beyond_float32_are_told_once(recwarn):
    with pytest.raises(AudioError, match="1 of 3 samples are NaN or infinite, the first at 1"):
        audio.to_mono(np.array([0.0, 1e39, 0.0]))
    assert not recwarn


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


@pytest.mark.parametrize("name", SHORT)
def test_mel_is_its_definition_to_the_last_bit(name):
    samples = audio.to_encoder_rate(prepared(name))
    exact = exact_log_mel(samples.double().numpy())
    off = np.abs(audio.log_mel(samples).numpy() - exact)
    assert (off <= np.spacing(np.abs(exact).astype(np.float32))).all()
    assert (off <= 0.5001 * np.spacing(np.abs(exact).astype(np.float32))).mean() > 0.999


MEL_PROGRAM = """
import sys, numpy as np
from covo_npu.runtime import audio
waveform = audio.prepare(*audio.read_audio(sys.argv[1]))
np.savez(sys.argv[2], waveform=waveform, mel=audio.features(waveform))
"""
# What stands for another machine: other vector units, other libraries' paths, another number of threads.
MACHINES = (
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"OMP_NUM_THREADS": "1"},
)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: next(iter(machine.values())))
def test_every_machine_hears_the_same(machine, tmp_path):
    path = DATA / "audio" / f"{SHORT[1]}.wav"  # 44.1 kHz: many phases
    command = [sys.executable, "-c", MEL_PROGRAM, path, tmp_path / "there.npz"]
    subprocess.run(command, env={**os.environ, **machine}, cwd=tmp_path, check=True)
    there = np.load(tmp_path / "there.npz")
    waveform = prepared(SHORT[1])
    assert np.array_equal(there["waveform"], waveform.numpy())
    assert largest_difference(there["mel"], audio.features(waveform)) <= 2.0**-23  # one step of float32


def test_mel_filters_are_librosas():
    """Bit for bit at Whisper's size; elsewhere the logarithm of another library may round otherwise."""
    for num_mels in (40, 80, 128):
        expected = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=num_mels)
        np.testing.assert_allclose(audio.mel_filters(num_mels).numpy(), expected, rtol=1e-6, atol=1e-15)
    np.testing.assert_array_equal(audio.mel_filters(128).numpy(), expected)


def test_silence_and_overlong_samples():
    assert torch.equal(audio.log_mel(torch.zeros(10)), torch.full((128, 3000), (-10 + 4) / 4))
    noise = torch.randn(500_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(audio.log_mel(noise), audio.log_mel(noise[:480_000]))


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
    wav.write_wav(tmp_path / "new" / "x.wav", waveform)
    with wave.open(str(tmp_path / "new" / "x.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        samples = np.frombuffer(file.readframes(7), "<i2")
    assert samples.tolist() == [0, 16384, -16384, 32767, -32767, 32767, -32767]
    assert os.listdir(tmp_path / "new") == ["x.wav"]
    readable = stat.S_IRUSR | stat.S_IWUSR
    assert (tmp_path / "new" / "x.wav").stat().st_mode & readable == readable


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    wav.write_wav(tmp_path / "x.wav", torch.zeros(10))
    before = (tmp_path / "x.wav").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AudioError, match=r"x\.wav: cannot be written: No space left on device"):
        wav.write_wav(tmp_path / "x.wav", torch.ones(10))
    assert (tmp_path / "x.wav").read_bytes() == before and os.listdir(tmp_path) == ["x.wav"]


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match=r"cannot be written: .*; choose another folder"):
        wav.write_wav(tmp_path / "file" / "x.wav", torch.zeros(10))


def test_a_wav_file_that_grows_is_valid_after_every_write(tmp_path):
    path, pieces = tmp_path / "new" / "x.wav", [torch.linspace(-1, 1, count) for count in (1, 2400, 77)]
    samples = []
    with wav.WavFile(path) as file:
        assert not path.parent.exists()
        for piece in pieces:
            file.write(piece)
            samples += (piece * 32767).round().int().tolist()
            data, rate = soundfile.read(path, dtype="int16")
            assert rate == 24_000 and data.tolist() == samples
            content = path.read_bytes()
            assert len(content) == 44 + 2 * len(samples)
            assert int.from_bytes(content[4:8], "little") == len(content) - 8
            assert int.from_bytes(content[40:44], "little") == 2 * len(samples)
            assert os.listdir(path.parent) == ["x.wav"]
    wav.write_wav(tmp_path / "whole.wav", torch.cat(pieces))
    assert (tmp_path / "whole.wav").read_bytes() == path.read_bytes() == content


def test_a_growing_file_is_valid_between_any_two_system_calls(tmp_path, monkeypatch):
    """Samples reach the file before the sizes that count them."""
    seen, path = [], tmp_path / "x.wav"
    write = wave.Wave_write._patchheader

    def watched(self):
        self._file.flush()
        seen.append(len(soundfile.read(path)[0]))
        write(self)

    with wav.WavFile(path) as file:
        file.write(torch.zeros(10))
        monkeypatch.setattr(wave.Wave_write, "_patchheader", watched)
        file.write(torch.zeros(5))
    assert seen == [10] and len(soundfile.read(path)[0]) == 15


def test_a_growing_file_keeps_what_was_written_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    with pytest.raises(AudioError, match="No space left"), wav.WavFile(tmp_path / "x.wav") as file:
        file.write(torch.ones(10))
        monkeypatch.setattr(wave.Wave_write, "writeframes", full)
        file.write(torch.ones(10))
    assert len(soundfile.read(tmp_path / "x.wav")[0]) == 10


def test_without_samples_there_is_no_file(tmp_path):
    with wav.WavFile(tmp_path / "x.wav"):
        pass
    assert not os.listdir(tmp_path)


def test_bytes_are_read_as_the_file_is():
    path = DATA / "audio" / "question_zh_44k_stereo.wav"
    data = io.BytesIO(path.read_bytes())
    samples, rate = audio.decode_audio(data)
    expected, expected_rate = audio.read_audio(path)
    assert rate == expected_rate == 44_100 and torch.equal(samples, expected)
    total = 2 * expected.shape[0]
    assert torch.equal(audio.decode_audio(data, max_samples=total)[0], expected)
    with pytest.raises(AudioError, match=f"^part 3: holds {total} samples, at most {total - 1} are possible$"):
        audio.decode_audio(data, "part 3", max_samples=total - 1)
    with pytest.raises(AudioError, match=r"^part 3: lasts \d+\.\d s, at most 0\.5 s"):
        audio.decode_audio(data, "part 3", max_seconds=0.5)
    with pytest.raises(AudioError, match=r"^part 3: is empty"):
        audio.decode_audio(io.BytesIO(), "part 3")
    with pytest.raises(AudioError, match=r"^part 3: is not an audio file"):
        audio.decode_audio(io.BytesIO(b"RIFF0000WAVE"), "part 3")


def test_pcm16_is_rounded_and_clipped():
    found = np.frombuffer(audio.to_pcm16(np.float32([0, 1, -1, 7, -7, 0.6 / 32767, -0.4 / 32767])), "<i2")
    assert found.tolist() == [0, 32767, -32767, 32767, -32767, 1, 0]
