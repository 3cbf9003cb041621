"""Audio in and out on the host, in float32: files, resampling, the log-mel features of the encoder.

N samples, M mels. 24 kHz is the rate of the front end and of replies, 16 kHz that of the encoder.
"""

from __future__ import annotations

import math
import os
import wave
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from covo_npu.kernels.errors import CovoError

SAMPLE_RATE = 24_000  # Hz
ENCODER_RATE = 16_000  # Hz
MAX_RATE = 1_000_000  # Hz; the resampling table grows with the rate and has 12 million entries here
FRAME_SAMPLES = SAMPLE_RATE // 100  # 10 ms, one mel frame
SEGMENT_SAMPLES = 30 * SAMPLE_RATE  # 30 s, what one pass of the encoder hears
ENCODER_SAMPLES = 30 * ENCODER_RATE
N_FFT = 400  # samples at 16 kHz, 25 ms
HOP = 160  # samples at 16 kHz, 10 ms: mel frames come at 100 Hz

SINC_ZEROS = 6  # zero crossings of the sinc on each side ("lowpass filter width")
SINC_ROLLOFF = 0.99  # cut-off as a fraction of the lower Nyquist frequency
MAX_DENSE_TAPS = 1 << 20  # phases times inputs of a period, up to which all taps are kept (4 MiB)
RESAMPLE_BLOCK = 1 << 18  # output samples at a time, bounds the working memory


Transform = Callable[[Tensor], Tensor]  # frames [..., 400] -> power spectra [..., 201]


class AudioError(CovoError):
    """Audio that cannot be read, used or written."""


def read_audio(path: str | os.PathLike[str], max_seconds: float | None = None) -> tuple[Tensor, int]:
    """Return (samples [N] float32 in [-1, 1], rate in Hz) of a file of any format that libsndfile reads.

    Channels are averaged. Raises AudioError if the file is missing, empty, no audio, damaged, without samples, has
    NaN or infinite samples, or lasts longer than max_seconds (judged by its header, before anything is read).
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise AudioError(f"{path}: is a folder, expected an audio file")
        if path.stat().st_size == 0:
            raise AudioError(f"{path}: is empty (0 bytes)")
        with soundfile.SoundFile(path) as file:
            seconds = file.frames / file.samplerate
            if max_seconds is not None and seconds > max_seconds:
                raise AudioError(f"{path}: lasts {seconds:.1f} s, at most {max_seconds:.1f} s are possible")
            samples, rate = file.read(dtype="float32", always_2d=True), int(file.samplerate)
    except FileNotFoundError:
        raise AudioError(f"{path}: does not exist") from None
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless formats need a rate from outside
        reason = getattr(error, "error_string", None) or error
        raise AudioError(f"{path}: is not an audio file that libsndfile can read ({str(reason).rstrip('.')})") from None
    return to_mono(samples, str(path)), rate


def to_mono(samples: Any, source: str = "audio") -> Tensor:
    """Return samples [N] float32 on the CPU, channels averaged. samples: array or tensor, [N] or [N, channels].

    Floats are taken as they are, integers are scaled to [-1, 1]. Raises AudioError naming the source if there are no
    samples, too many axes, or NaN or infinite values.
    """
    array = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if array.ndim not in (1, 2):
        raise AudioError(f"{source}: expected samples as [N] or [N, channels], found shape {list(array.shape)}")
    if array.size == 0:
        raise AudioError(f"{source}: has no samples")
    if array.dtype.kind == "i":
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    elif array.dtype.kind != "f":
        raise AudioError(f"{source}: expected floating-point or signed integer samples, found {array.dtype}")
    array = array.astype(np.float32, copy=False)
    mono = array if array.ndim == 1 else array.mean(axis=1, dtype=np.float32)
    finite = np.isfinite(mono)
    if not finite.all():
        raise AudioError(
            f"{source}: {finite.size - np.count_nonzero(finite)} of {finite.size} samples are NaN or infinite, "
            f"the first at {int(np.argmin(finite))}"
        )
    return torch.from_numpy(np.ascontiguousarray(mono))


def prepare(samples: Tensor, rate: int, source: str = "audio") -> Tensor:
    """Return the waveform [N] at 24 kHz, N a multiple of 480. samples: [N] float32 at `rate` Hz.

    Trims to whole 10 ms, then pads to whole 20 ms. Raises AudioError naming the source if less than 10 ms are left or
    the rate is not 1 Hz to 1 MHz. The resampling kernel is evaluated in float32 here.
    """
    if not 0 < rate <= MAX_RATE:
        raise AudioError(f"{source}: its sample rate of {rate} Hz is outside 1 to {MAX_RATE} Hz; resample it first")
    waveform = resample(samples, rate, SAMPLE_RATE, torch.float32)
    length = waveform.shape[0] // FRAME_SAMPLES * FRAME_SAMPLES
    if length == 0:
        milliseconds = 1000 * waveform.shape[0] / SAMPLE_RATE
        raise AudioError(f"{source}: lasts {milliseconds:.1f} ms, expected at least 10 ms")
    return F.pad(waveform[:length], (0, -length % (2 * FRAME_SAMPLES)))


def num_placeholders(num_samples: int, adapter_layers: int = 3) -> int:
    """Return how many tokens a waveform takes in the prompt. num_samples: at 24 kHz.

    100 Hz frames, halved by the encoder's stride and by each adapter layer, rounding up each time.
    """
    frames = num_samples // FRAME_SAMPLES
    for _ in range(1 + adapter_layers):
        frames = -(-frames // 2)
    return frames


def max_seconds(placeholders: int, adapter_layers: int = 3) -> float:
    """Return how long audio may last, in seconds, to take at most so many placeholders."""
    return placeholders * 2 ** (1 + adapter_layers) * FRAME_SAMPLES / SAMPLE_RATE


def segments(waveform: Tensor) -> list[Tensor]:
    """Return views of a 24 kHz waveform [N], 30 s each, the last one shorter."""
    return list(waveform.split(SEGMENT_SAMPLES))


def features(waveform: Tensor, mel_filters: Tensor) -> Tensor:
    """Return the encoder's input [segments, M, 3000] float32, one row per 30 s of a 24 kHz waveform [N]."""
    return torch.stack([log_mel(to_encoder_rate(segment), mel_filters) for segment in segments(waveform)])


def to_encoder_rate(segment: Tensor) -> Tensor:
    """Return a 24 kHz segment [N] at 16 kHz. The kernel is evaluated in float64 here and rounded to float32."""
    return resample(segment, SAMPLE_RATE, ENCODER_RATE, torch.float64)


def log_mel(samples: Tensor, mel_filters: Tensor, transform: Transform | None = None) -> Tensor:
    """Return Whisper's log-mel features [M, 3000] float32. samples: [N] float32 at 16 kHz; mel_filters: [M, 201].

    Padded or trimmed to 30 s; periodic Hann window 400, hop 160, centred with reflection, power, log10 from 1e-10 and
    from 8 under the maximum, (x + 4) / 4. Runs on the device of the samples. transform: `fft_power`, the default on
    the CPU, or `dft_power`, the default elsewhere; in the quietest bins they differ by up to 1e-4, which is float32's
    rounding at 80 dB under the loudest. Source: arXiv 2212.04356, section 2.2.
    """
    transform = transform or (fft_power if samples.device.type == "cpu" else dft_power)
    samples = samples[:ENCODER_SAMPLES]
    samples = F.pad(samples, (0, ENCODER_SAMPLES - samples.shape[0]))
    padded = F.pad(samples[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
    power = transform(padded.unfold(0, N_FFT, HOP)[:-1])  # [3000, 201]
    mel = mel_filters.to(power.device) @ power.T
    logarithm = mel.clamp(min=1e-10).log10()
    return (torch.maximum(logarithm, logarithm.amax() - 8.0) + 4.0) / 4.0


def fft_power(frames: Tensor) -> Tensor:
    """Return the windowed power spectra [..., 201] of frames [..., 400]."""
    return torch.fft.rfft(frames * torch.hann_window(N_FFT, device=frames.device)).abs().square()


def dft_power(frames: Tensor) -> Tensor:
    """Return what fft_power does, by two matrix products: for devices without complex numbers."""
    cosine, sine = _windowed_dft(frames.device)
    return (frames @ cosine).square() + (frames @ sine).square()


def resample(samples: Tensor, from_rate: int, to_rate: int, kernel_dtype: torch.dtype) -> Tensor:
    """Return samples [ceil(N * to_rate / from_rate)] at to_rate. samples: [N] float32 at from_rate Hz.

    Windowed-sinc interpolation: Hann window, 6 zero crossings, roll-off 0.99; the signal counts as zero outside.
    kernel_dtype: what the kernel is evaluated in before it is rounded to float32.
    Source: Smith, "Digital Audio Resampling", https://ccrma.stanford.edu/~jos/resample.
    """
    if from_rate == to_rate:
        return samples
    divisor = math.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor  # `up` output samples for every `down` input samples
    length = -(-up * samples.shape[0] // down)
    # The usual rates have few phases: a strided convolution over all taps of a period, whose sums round as upstream's
    # do. Odd pairs would make that kernel gigabytes: there only the taps inside the window are kept and gathered.
    apply = _convolve if up * down <= MAX_DENSE_TAPS else _gather
    return apply(samples, up, down, length, kernel_dtype)


def _convolve(samples: Tensor, up: int, down: int, length: int, dtype: torch.dtype) -> Tensor:
    kernel, margin = _dense_kernel(up, down, dtype)  # [up, margin + down + margin]
    padded = F.pad(samples, (margin, margin + down))
    periods = -(-length // up)
    block = max(1, RESAMPLE_BLOCK // up)
    pieces = []
    for begin in range(0, periods, block):
        end = min(begin + block, periods)
        piece = padded[begin * down : (end - 1) * down + kernel.shape[1]]
        pieces.append(F.conv1d(piece[None, None], kernel[:, None], stride=down)[0].T.reshape(-1))
    return torch.cat(pieces)[:length] if pieces else samples.new_empty(0)


def _gather(samples: Tensor, up: int, down: int, length: int, dtype: torch.dtype) -> Tensor:
    kernel, starts, margin = _sparse_kernel(up, down, dtype)  # [up, taps], [up]
    taps = kernel.shape[1]
    windows = F.pad(samples, (margin, margin + down + taps)).unfold(0, taps, 1)  # [N + ..., taps], a view
    out = samples.new_empty(length)
    block = max(1, RESAMPLE_BLOCK * 16 // taps)
    for begin in range(0, length, block):
        index = torch.arange(begin, min(begin + block, length))
        phase = index % up
        position = index // up * down + starts[phase] + margin
        out[begin : begin + block] = (windows[position] * kernel[phase]).sum(1)
    return out


def write_wav(path: str | os.PathLike[str], waveform: Tensor | NDArray[np.float32], rate: int = SAMPLE_RATE) -> None:
    """Write a waveform [N] as a 16-bit PCM WAV file; values beyond [-1, 1] are clipped.

    The file appears complete or not at all; its folder is made if need be. Raises AudioError if it cannot be written.
    """
    path = Path(path)
    samples = (
        (torch.as_tensor(waveform).detach().cpu().float().clamp(-1.0, 1.0) * 32767.0).round().numpy().astype("<i2")
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream, wave.open(stream, "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes(samples.tobytes())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise AudioError(f"{path}: cannot be written: {error.strerror or error}; choose another folder") from None


def _half_width(up: int, down: int) -> int:
    """Return how many input samples the window reaches to each side, rounded up."""
    return math.ceil(SINC_ZEROS * down / (min(up, down) * SINC_ROLLOFF))


def _sinc(phase: Tensor, position: Tensor, up: int, down: int, dtype: torch.dtype) -> Tensor:
    """Return the kernel, float32, at input positions [..., taps] around output phases [up, 1] of a period."""
    cutoff = min(up, down) * SINC_ROLLOFF
    t = -phase.to(dtype) / up + position.to(dtype) / down  # in periods
    t = (t * cutoff).clamp(-SINC_ZEROS, SINC_ZEROS)  # in zero crossings
    window = torch.cos(t * math.pi / SINC_ZEROS / 2).square()
    t = t * math.pi
    sinc = torch.where(t == 0, torch.ones_like(t), t.sin() / t)
    return (sinc * (window * (cutoff / down))).float()


@lru_cache(maxsize=8)
def _dense_kernel(up: int, down: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return (kernel [up, margin + down + margin], margin): every phase over all inputs that its period may touch."""
    margin = _half_width(up, down)
    return _sinc(torch.arange(up)[:, None], torch.arange(-margin, margin + down), up, down, dtype), margin


@lru_cache(maxsize=2)
def _sparse_kernel(up: int, down: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Return (kernel [up, taps], starts [up], margin): output n reads from input n // up * down + starts[n % up] on."""
    margin = _half_width(up, down)
    phase = torch.arange(up)
    starts = phase * down // up - margin
    return _sinc(phase[:, None], starts[:, None] + torch.arange(2 * margin + 2), up, down, dtype), starts, margin


@lru_cache(maxsize=4)
def _windowed_dft(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (cosines, sines), [400, 201] float32 each, with the periodic Hann window in them. Evaluated in float64."""
    n = torch.arange(N_FFT, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / N_FFT)
    # The product n * k is taken modulo 400 before it becomes an angle: exact, and the angle stays small.
    turns = torch.outer(torch.arange(N_FFT), torch.arange(N_FFT // 2 + 1)) % N_FFT
    angle = turns.double() * (2 * math.pi / N_FFT)
    cosine, sine = ((window[:, None] * function(angle)).float().to(device) for function in (torch.cos, torch.sin))
    return cosine, sine
