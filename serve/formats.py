"""Audio as clients send and want it: names of formats, and bytes to samples and back."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterator

import numpy as np
import soundfile
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.runtime import audio
from covo_npu.runtime.audio import AudioError

DATA = "data:"  # how an address begins that holds the audio itself
PCM16 = "pcm16"
HEARD = ("wav", "mp3", "flac", "ogg", "opus", "aiff", PCM16)  # containers are told apart by their own first bytes
MAX_SAMPLES = 1 << 27  # of all channels, as many as half a gigabyte holds: a small file may unpack to far more


def from_base64(text: str, source: str) -> bytes:
    """Return the bytes of base64, or of a data: address of base64. Raises AudioError naming the source."""
    if text.startswith(DATA):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise AudioError(f"{source}: is a data: address without base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise AudioError(f"{source}: is not base64 ({error})") from None


def decode(data: bytes, form: str, source: str, max_seconds: float) -> Tensor:
    """Return a waveform [N] at 24 kHz, prepared. form: one of HEARD; pcm16 is mono at 24 kHz, little-endian.

    Raises AudioError naming the source.
    """
    if form != PCM16:
        samples, rate = audio.decode_audio(io.BytesIO(data), source, max_seconds, MAX_SAMPLES)
        return audio.prepare(samples, rate, source)
    if len(data) % 2:
        raise AudioError(f"{source}: {len(data)} bytes are no whole number of 16-bit samples")
    if len(data) / 2 > max_seconds * audio.SAMPLE_RATE:
        raise AudioError(f"{source}: lasts longer than the {max_seconds:.1f} s that are possible")
    return audio.prepare(audio.to_mono(np.frombuffer(data, "<i2"), source), audio.SAMPLE_RATE, source)


def _file(container: str, subtype: str) -> Callable[[bytes], bytes]:
    def encode(pcm: bytes) -> bytes:
        file = io.BytesIO()
        samples = np.frombuffer(pcm, "<i2")
        soundfile.write(file, samples, audio.SAMPLE_RATE, format=container, subtype=subtype)
        return file.getvalue()

    return encode


# How a whole reply may be wanted: name -> what makes it of 16-bit PCM at 24 kHz.
SPOKEN: dict[str, Callable[[bytes], bytes]] = {
    "wav": _file("WAV", "PCM_16"),
    "mp3": _file("MP3", "MPEG_LAYER_III"),
    "flac": _file("FLAC", "PCM_16"),
    "opus": _file("OGG", "OPUS"),
    PCM16: lambda pcm: pcm,
}


class PcmChunks:
    """Speech as it comes, in base64 of 16-bit PCM: pieces that may also be put together before they are decoded."""

    UNIT = 6  # bytes: whole samples, and base64 without padding
    CHUNK_BYTES = 4_000 * UNIT  # 0.5 s

    def __init__(self) -> None:
        self._rest = b""

    def push(self, samples: NDArray[np.float32]) -> Iterator[str]:
        """Yield all but a last sample or two of what has come."""
        pcm = self._rest + audio.to_pcm16(samples)
        whole = len(pcm) - len(pcm) % self.UNIT
        self._rest = pcm[whole:]
        for begin in range(0, whole, self.CHUNK_BYTES):
            yield to_base64(pcm[begin : min(begin + self.CHUNK_BYTES, whole)])

    def finish(self) -> Iterator[str]:
        """Yield the rest, if there is any."""
        if self._rest:
            yield to_base64(self._rest)
            self._rest = b""


def to_base64(data: bytes) -> str:
    """Return bytes as text."""
    return base64.b64encode(data).decode("ascii")


def encode(waveform: NDArray[np.float32], form: str) -> bytes:
    """Return a waveform [N] at 24 kHz in a format of SPOKEN."""
    return SPOKEN[form](audio.to_pcm16(waveform))
