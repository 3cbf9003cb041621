"""Speech as WAV files: 16-bit PCM, one channel."""

from __future__ import annotations

import contextlib
import io
import os
import wave
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.runtime import output
from covo_npu.runtime.audio import SAMPLE_RATE, AudioError, to_pcm16


def wav_bytes(waveform: Tensor | NDArray[np.float32], rate: int = SAMPLE_RATE) -> bytes:
    """Return a waveform [N] as a WAV file of 16-bit PCM; values beyond [-1, 1] are clipped."""
    data = io.BytesIO()
    with _opened(data, rate) as file:
        file.writeframes(to_pcm16(waveform))
    return data.getvalue()


def write_wav(path: str | os.PathLike[str], waveform: Tensor | NDArray[np.float32], rate: int = SAMPLE_RATE) -> None:
    """Write what wav_bytes returns, as output.write does. Raises AudioError if it cannot be written."""
    try:
        output.write(path, wav_bytes(waveform, rate))
    except output.OutputError as error:
        raise AudioError(str(error)) from None


class WavFile:
    """A new WAV file that grows and is valid at any moment: samples are written first, then the sizes before.

    It appears with its first samples; if a file of its name is there, it gets a number. A context manager: leaving it
    closes the file, which keeps what was written. path: where it is, or would be.
    """

    def __init__(self, path: Path, rate: int = SAMPLE_RATE) -> None:
        self.path, self._rate = path, rate
        self._stream: IO[bytes] | None = None
        self._file: wave.Wave_write | None = None

    def write(self, waveform: Tensor | NDArray[np.float32]) -> None:
        """Append samples [n]. Makes the folder if need be. Raises AudioError if they cannot be written."""
        try:
            if self._file is None:
                self._begin(waveform)
            else:
                self._append(waveform)
        except (OSError, ValueError) as error:
            raise AudioError(str(output.unwritable(self.path, error))) from None

    def _begin(self, waveform: Tensor | NDArray[np.float32]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with output.partial(self.path.parent) as partial:
            self._stream = partial.open("xb")
            self._file = _opened(self._stream, self._rate)
            self._append(waveform)
            self.path = output.appear(partial, self.path)

    def _append(self, waveform: Tensor | NDArray[np.float32]) -> None:
        assert self._file is not None and self._stream is not None
        self._file.writeframes(to_pcm16(waveform))  # then it mends the sizes
        self._stream.flush()

    def __enter__(self) -> WavFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which keeps what was written."""
        for opened in (self._file, self._stream):
            with contextlib.suppress(OSError):  # whatever counts has been flushed
                if opened:
                    opened.close()


def _opened(stream: IO[bytes], rate: int) -> wave.Wave_write:
    file = wave.open(stream, "wb")  # noqa: SIM115 - who asks closes it
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(rate)
    return file
