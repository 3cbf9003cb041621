"""Audio as the model hears it, all of it on the host: from files and arrays to the log-mel features of the encoder.

N samples, M mels. 24 kHz is the rate of the front end and of replies, 16 kHz that of the encoder.
"""

from __future__ import annotations

import io
import logging
import math
import os
import shlex
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import containers
from covo_npu.runtime.mixing import Mix, weights
from covo_npu.runtime.resampling import resample

log = logging.getLogger(__name__)

Warn = Callable[[str], object]  # gets one line

SAMPLE_RATE = 24_000  # Hz
ENCODER_RATE = 16_000  # Hz
MAX_RATE = 1_000_000  # Hz; the resampling table grows with the rate and has 12 million entries here
FRAME_SAMPLES = SAMPLE_RATE // 100  # 10 ms, one mel frame
SEGMENT_SAMPLES = 30 * SAMPLE_RATE  # 30 s, what one pass of the encoder hears
ENCODER_SAMPLES = 30 * ENCODER_RATE
N_FFT = 400  # samples at 16 kHz, 25 ms
HOP = 160  # samples at 16 kHz, 10 ms: mel frames come at 100 Hz

DECODE_SAMPLES = 1 << 14  # at a time, of all channels; of a damaged file the last of these are lost
MOST_RATES = 4  # of the recordings in one file: the resampling table of an odd one takes a second to make
MAX_PIPED_BYTES = 1 << 29  # half an hour of two channels at 48 kHz in 24 bits
MAX_CHANNELS = 256  # of an array: what libsndfile may read is 1024, but nobody's array
UNKNOWN_S = 1e8  # no header states so much in earnest
FRAMES_OFF_S = 0.05  # codecs pad and trim
LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")

# Slaney's mel scale: linear up to 1 kHz, then logarithmic
MEL_HZ = 200 / 3  # of a mel below
MEL_BREAK_HZ, MEL_BREAK = 1000.0, 15.0
MEL_LOG_STEP = math.log(6.4) / 27  # ln of the ratio of two frequencies a mel apart above


class AudioError(CovoError):
    """Audio that cannot be read, used or written."""


class TooLongError(AudioError):
    """Audio that lasts longer than is possible."""


def read_audio(
    path: str | os.PathLike[str], max_seconds: float | None = None, warn: Warn = log.warning
) -> tuple[Tensor, int]:
    """Return (samples [N] float32, rate in Hz) of a file of any format that libsndfile reads: see decode_audio.

    Raises AudioError if the file is missing, empty, no audio, damaged from its start, without samples, has NaN or
    infinite samples, or lasts longer than max_seconds.
    """
    try:
        if Path(path).is_dir():
            raise AudioError(f"{path}: is a folder, expected an audio file")
        file = Path(path).open("rb")  # noqa: SIM115 - closed below; a ValueError of what comes there is not of the name
    except FileNotFoundError:
        raise AudioError(f"{path}: does not exist") from None
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # it holds a NUL, or half a character
        raise AudioError(f"{str(path)!r}: no file can have this name ({error})") from None
    with file:
        try:
            return decode_audio(file, str(path), max_seconds, warn=warn)
        except OSError as error:
            raise AudioError(f"{path}: cannot be read: {error.strerror or error}") from None


def decode_audio(
    file: BinaryIO,
    source: str = "audio",
    max_seconds: float | None = None,
    max_samples: int | None = None,
    warn: Warn = log.warning,
) -> tuple[Tensor, int]:
    """Return what read_audio does, of a file that is open; source: what messages call it; max_samples: of all channels.

    It is heard to its end, one recording in it after the other, whatever a header states; those of several rates come
    at 24 kHz. What cannot be sought in is read into memory. Channels are mixed to one: see mixing.weights. Samples are
    in [-1, 1] unless the file's are not.
    warn gets a line for everything that is odd: Mix.findings, and where header and content disagree. Raises OSError if
    the file cannot be read, else what read_audio raises.
    """
    if not file.seekable():
        file = _taken_in(file, source)
    if not file.seek(0, os.SEEK_END):
        raise AudioError(f"{source}: is empty (0 bytes)")
    mix, seconds = Mix(), 0.0
    heard: list[tuple[Tensor, int]] = []
    doubts: list[str] = []
    recordings = containers.parts(file)
    if len(recordings) > containers.MOST_RECORDINGS:
        raise TooLongError(
            f"{source}: holds more than {containers.MOST_RECORDINGS} recordings, one behind the other; make them one"
        )
    for part in recordings:
        try:
            samples, rate, more = _recording(file, part, mix, source, max_seconds, max_samples)
        except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a rate must come from outside
            if not heard:
                raise AudioError(f"{source}: {_not_audio(file, error, source)}") from None
            more = [f"what follows its first {seconds:.2f} s is damaged and not heard"]
        else:
            heard.append((samples, rate))
            seconds += len(samples) / rate
            _require_within(seconds, mix.samples, source, max_seconds, max_samples)
        doubts += more
    if not seconds:
        raise AudioError(f"{source}: {'; '.join(('has no samples', *doubts))}")
    samples, rate = _joined(heard, source)
    samples = _usable(samples, source)
    for finding in dict.fromkeys((*doubts, *mix.findings())):
        warn(f"{source}: {finding}")
    return samples, rate


def _joined(heard: list[tuple[Tensor, int]], source: str) -> tuple[Tensor, int]:
    """Return (samples [N], rate in Hz) of recordings one behind the other: at 24 kHz if their rates are several."""
    heard = [(samples, rate) for samples, rate in heard if len(samples)]
    rates, pieces = sorted({rate for _, rate in heard}), [samples for samples, _ in heard]
    if len(rates) == 1:
        return torch.cat(pieces), rates[0]
    if len(rates) > MOST_RATES:
        raise AudioError(f"{source}: holds recordings of {len(rates)} sample rates, at most {MOST_RATES} are joined")
    for rate in rates:
        _require_rate(rate, source)
    for rate in rates:  # one after the other, so that its resampling table is made once
        for i, (samples, its_rate) in enumerate(heard):
            if its_rate == rate:
                pieces[i] = resample(samples, rate, SAMPLE_RATE, torch.float32)
    return torch.cat(pieces), SAMPLE_RATE


class _Recording(soundfile.SoundFile):  # type: ignore[misc] # it has no types
    """Is read from start to end only: to seek would ask for what some codecs and damaged files cannot."""

    def seekable(self) -> bool:
        """Return False."""
        return False


def _recording(
    file: BinaryIO, part: containers.Part, mix: Mix, source: str, max_seconds: float | None, max_samples: int | None
) -> tuple[Tensor, int, list[str]]:
    """Return (samples [N], rate, doubts) of one recording. Raises LibsndfileError if it gives no sample."""
    heard: list[NDArray[np.float32]] = []
    doubts = [part.doubt] if part.doubt else []
    with _Recording(containers.Window(file, part)) as sound:
        rate, channels = int(sound.samplerate), int(sound.channels)
        stated = sound.frames / rate
        counts = weights(channels, sound.format, part.mask)
        mix.lossy = sound.subtype in LOSSY
        block = np.empty((max(1, DECODE_SAMPLES // channels), channels), np.float32)
        frames = 0
        try:
            if stated < UNKNOWN_S:
                _require_within(stated, sound.frames * channels, source, max_seconds, max_samples)
            while len(read := sound.read(out=block)):
                heard.append(mix.add(read, counts).copy())
                frames += len(read)
                _require_within(frames / rate, mix.samples, source, max_seconds, max_samples)
        except soundfile.LibsndfileError as error:
            if not heard:
                raise
            doubts.append(f"damaged after {frames / rate:.2f} s ({_reason(error)}): what follows is not heard")
    if not doubts and stated < UNKNOWN_S and stated - frames / rate > FRAMES_OFF_S:
        doubts.append(f"its header states {stated:.2f} s, {frames / rate:.2f} s are there")
    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *heard])), rate, doubts


def _require_within(
    seconds: float, samples: int, source: str, max_seconds: float | None, max_samples: int | None
) -> None:
    if max_seconds is not None and seconds > max_seconds:
        raise TooLongError(f"{source}: lasts {seconds:.1f} s, at most {max_seconds:.1f} s are possible")
    if max_samples is not None and samples > max_samples:
        raise TooLongError(f"{source}: holds {samples} samples, at most {max_samples} are possible")


def _taken_in(file: BinaryIO, source: str) -> BinaryIO:
    """Return what comes out of a pipe, in memory."""
    data = bytearray()
    while len(data) <= MAX_PIPED_BYTES and (more := file.read(MAX_PIPED_BYTES + 1 - len(data))):
        data += more  # an unbuffered pipe gives what is there
    if len(data) > MAX_PIPED_BYTES:
        raise TooLongError(f"{source}: more than {MAX_PIPED_BYTES >> 20} MiB came out of this pipe: write a file first")
    return io.BytesIO(data)


def _not_audio(file: BinaryIO, error: Exception, source: str) -> str:
    """Return what a message says of a file that libsndfile does not read."""
    name, converts = containers.foreign(file)
    if name and not converts:
        return f"is not audio but {name}"
    command = f"ffmpeg -i {shlex.quote(source)} -ar 24000 {shlex.quote(Path(source).stem + '.wav')}"
    if name:
        return f"is {name}, which libsndfile cannot read. This converts it: {command}"
    hint = f". Perhaps this converts it: {command}" if converts else ""
    return f"is not an audio file that libsndfile can read ({_reason(error)}){hint}"


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", None) or error).rstrip(".")


def to_mono(samples: Any, source: str = "audio", warn: Warn = log.warning) -> Tensor:
    """Return samples [N] float32 on the CPU, channels mixed to one. samples: array or tensor, [N] or [N, channels].

    Floats are taken as they are, integers are scaled to [-1, 1]. warn gets a line for everything that is odd. Raises
    AudioError naming the source if there are no samples, too many axes or channels, or NaN or infinite values.
    """
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples  # NumPy has no bfloat16
    array = np.asarray(samples)
    if array.ndim not in (1, 2):
        raise AudioError(f"{source}: expected samples as [N] or [N, channels], found shape {list(array.shape)}")
    if array.size == 0:
        raise AudioError(f"{source}: has no samples")
    if array.ndim == 2 and array.shape[1] > MAX_CHANNELS:
        raise AudioError(
            f"{source}: expected samples as [N, channels], found shape {list(array.shape)}: more than {MAX_CHANNELS} "
            "channels; if they come first, transpose the array"
        )
    if array.dtype.kind == "i":
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    elif array.dtype.kind != "f":
        raise AudioError(f"{source}: expected floating-point or signed integer samples, found {array.dtype}")
    with np.errstate(over="ignore"):  # what float32 does not hold is told below
        array = array.astype(np.float32, copy=False)
    mix = Mix()
    mono = mix.add(array.reshape(len(array), -1), None if array.ndim == 1 else weights(array.shape[1]))
    found = _usable(torch.from_numpy(np.ascontiguousarray(mono)), source)
    for finding in mix.findings():
        warn(f"{source}: {finding}")
    return found


def _usable(samples: Tensor, source: str) -> Tensor:
    """Return the samples. Raises AudioError if there are none, or some are not finite."""
    if not len(samples):
        raise AudioError(f"{source}: has no samples")
    finite = np.isfinite(samples.numpy())
    if not finite.all():
        raise AudioError(
            f"{source}: {finite.size - np.count_nonzero(finite)} of {finite.size} samples are NaN or infinite, "
            f"the first at {int(np.argmin(finite))}"
        )
    return samples


def prepare(samples: Tensor, rate: int, source: str = "audio") -> Tensor:
    """Return the waveform [N] at 24 kHz, N a multiple of 480. samples: [N] float32 at `rate` Hz.

    Trims to whole 10 ms, then pads to whole 20 ms. Raises AudioError naming the source if less than 10 ms are left or
    the rate is no whole number of 1 Hz to 1 MHz. The resampling kernel is evaluated in float32 here.
    """
    _require_rate(rate, source)
    waveform = resample(samples, int(rate), SAMPLE_RATE, torch.float32)
    length = waveform.shape[0] // FRAME_SAMPLES * FRAME_SAMPLES
    if length == 0:
        milliseconds = 1000 * waveform.shape[0] / SAMPLE_RATE
        raise AudioError(f"{source}: lasts {milliseconds:.1f} ms, expected at least 10 ms")
    return F.pad(waveform[:length], (0, -length % (2 * FRAME_SAMPLES)))


def _require_rate(rate: float, source: str) -> None:
    if rate % 1:
        raise AudioError(f"{source}: its sample rate of {rate} Hz is no whole number; resample it first")
    if not 0 < rate <= MAX_RATE:
        raise AudioError(f"{source}: its sample rate of {rate} Hz is outside 1 to {MAX_RATE} Hz; resample it first")


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


def features(waveform: Tensor, num_mels: int = 128) -> Tensor:
    """Return the encoder's input [segments, M, 3000] float32, one row per 30 s of a 24 kHz waveform [N]."""
    return torch.stack([log_mel(to_encoder_rate(segment), num_mels) for segment in segments(waveform)])


def to_encoder_rate(segment: Tensor) -> Tensor:
    """Return a 24 kHz segment [N] at 16 kHz. The kernel is evaluated in float64 here and rounded to float32."""
    return resample(segment, SAMPLE_RATE, ENCODER_RATE, torch.float64)


def log_mel(samples: Tensor, num_mels: int = 128) -> Tensor:
    """Return Whisper's log-mel features [M, 3000] float32. samples: [N] float32 at 16 kHz.

    Padded or trimmed to 30 s; periodic Hann window 400, hop 160, centred with reflection, power, mel bands, log10 from
    1e-10 and from 8 under the maximum, (x + 4) / 4. All of it in float64, rounded once: in float32 a bin 80 dB under
    the loudest drowns in the rounding of the transform, which differs from library to library and from processor to
    processor. Source: arXiv 2212.04356, section 2.2.
    """
    samples = samples[:ENCODER_SAMPLES].double()
    samples = F.pad(samples, (0, ENCODER_SAMPLES - samples.shape[0]))
    padded = F.pad(samples[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
    frames = padded.unfold(0, N_FFT, HOP)[:-1] * torch.hann_window(N_FFT, dtype=torch.float64)
    spectrum = torch.fft.rfft(frames)  # [3000, 201]
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    mel = mel_filters(num_mels).double() @ power.T
    logarithm = mel.clamp_(min=1e-10).log10_()
    return ((torch.maximum(logarithm, logarithm.amax() - 8.0) + 4.0) / 4.0).float()


@lru_cache(maxsize=4)
def mel_filters(num_mels: int) -> Tensor:
    """Return Slaney's mel filter bank [M, 201] float32: triangles of equal area from 0 Hz to 8 kHz.

    Source: Slaney, Auditory Toolbox, Technical Report 1998-010.
    """
    frequencies = torch.arange(N_FFT // 2 + 1, dtype=torch.float64) * (ENCODER_RATE / N_FFT)
    step = _mel_of(ENCODER_RATE / 2) / (num_mels + 1)
    edges = torch.tensor([_hertz_of(step * i) for i in range(num_mels + 2)], dtype=torch.float64)
    ramps = edges[:, None] - frequencies[None, :]
    width = edges.diff()[:, None]
    triangles = torch.minimum(-ramps[:-2] / width[:-1], ramps[2:] / width[1:]).clamp(min=0).float()
    return (triangles.double() * (2.0 / (edges[2:] - edges[:-2]))[:, None]).float()


def _mel_of(hertz: float) -> float:
    above = hertz >= MEL_BREAK_HZ
    return MEL_BREAK + math.log(hertz / MEL_BREAK_HZ) / MEL_LOG_STEP if above else hertz / MEL_HZ


def _hertz_of(mel: float) -> float:
    return MEL_BREAK_HZ * math.exp(MEL_LOG_STEP * (mel - MEL_BREAK)) if mel >= MEL_BREAK else mel * MEL_HZ


def to_pcm16(waveform: Tensor | NDArray[np.float32]) -> bytes:
    """Return a waveform [N] as 16-bit little-endian PCM; values beyond [-1, 1] are clipped."""
    samples = torch.as_tensor(waveform).detach().cpu().float().clamp(-1.0, 1.0) * 32767.0
    return samples.round().numpy().astype("<i2").tobytes()
