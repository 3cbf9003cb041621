"""What a client has said and nobody has asked yet: its samples as they came, and where turns begin and end in them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covo_npu.runtime import audio
from covo_npu.serve import vad
from covo_npu.serve.errors import invalid
from covo_npu.serve.realtime.session import PCM, Format, TurnDetection
from covo_npu.serve.resample import Resampler, g711, pcm16
from covo_npu.serve.vad import SpeechStarted, SpeechStopped, TurnDetector

MARGIN_MS = 100  # of silence that is kept beyond the padding: windows that the detector has not judged yet


class Hearing:
    """The input buffer of one session. Times are in ms of all audio that the session was ever sent.

    Samples are kept at the rate at which they come: a turn becomes a waveform by the way a file of it would. Only the
    detector hears a stream of another rate. For one thread at a time.
    """

    def __init__(self, form: Format, detection: TurnDetection | None, max_seconds: float) -> None:
        self.form, self._max_seconds = form, max_seconds
        self._pieces: list[NDArray[np.float32]] = []
        self._size = 0  # samples of all pieces
        self._begin_ms = 0.0  # of the first sample
        self._detector: TurnDetector | None = None
        self.listen(detection)

    @property
    def end_ms(self) -> float:
        """When the last sample that was sent ends."""
        return self._begin_ms + self._size * 1000 / self.form.sample_rate

    @property
    def speaking(self) -> bool:
        """Whether a turn is going on that the detector has noticed."""
        return self._detector is not None and self._detector.speaking

    @property
    def empty(self) -> bool:
        """Whether there is nothing to commit."""
        return not self._size

    def listen(self, detection: TurnDetection | None) -> None:
        """Notice turns from now on, or none; what was sent before belongs to no turn."""
        self._padding_ms = detection.prefix_padding_ms if detection else 0
        self._heard_from_ms = self.end_ms
        self._resampler = Resampler(self.form.sample_rate, vad.RATE)
        self._detector = None
        if detection:
            self._detector = TurnDetector(
                detection.threshold, detection.silence_duration_ms, detection.prefix_padding_ms
            )

    def change(self, form: Format, detection: TurnDetection | None) -> None:
        """Hear another encoding from now on. Raises ApiError if the buffer holds part of a turn of the old one."""
        if self.speaking or (self._detector is None and not self.empty):
            raise invalid("session.audio.input.format", "commit or clear the input buffer before its format changes")
        self._drop(self._size)
        self.form = form
        self.listen(detection)

    def append(self, data: bytes) -> list[SpeechStarted | SpeechStopped]:
        """Take more audio; return the turns that begin and end with it. Raises ApiError, and takes none of it then.

        A turn that fills the buffer ends there.
        """
        try:
            samples = pcm16(data) if self.form.type == PCM else g711(data, self.form.type.removeprefix("audio/"))
        except ValueError:
            raise invalid("audio", f"{len(data)} bytes are no whole number of 16-bit samples") from None
        if not samples.size:
            return []
        turns: list[SpeechStarted | SpeechStopped] = []
        most = round(self._max_seconds * self.form.sample_rate)
        if self.speaking and self._size + samples.size > most >= samples.size:
            turns.append(SpeechStopped(round(self.end_ms)))
            self._forget_turn()
        elif self._size + samples.size > most:
            message = f"the input buffer holds {self._max_seconds:.0f} s at most: commit it, or clear it"
            raise invalid("audio", message, "input_audio_buffer_full")
        self._pieces.append(samples)
        self._size += samples.size
        if self._detector is None:
            return []
        begin = round(self._heard_from_ms)
        heard = self._detector.feed(self._resampler.push(samples))
        return turns + [type(turn)(begin + turn.at_ms) for turn in heard]

    def take(self, start_ms: float | None = None, stop_ms: float | None = None) -> Tensor:
        """Return a turn as a waveform [N] at 24 kHz, prepared; it and what is before it leave the buffer.

        Without times all of it. Raises ApiError if less than 10 ms are left, and takes nothing then.
        """
        begin, end = self._index(start_ms, 0), self._index(stop_ms, self._size)
        try:
            waveform = audio.prepare(torch.from_numpy(self._whole()[begin:end]), self.form.sample_rate)
        except audio.AudioError:
            length_ms = max(0, end - begin) * 1000 / self.form.sample_rate
            message = f"the input buffer has {length_ms:.1f} ms of audio, a question needs 10 ms"
            raise invalid(None, message, "input_audio_buffer_commit_empty") from None
        self._drop(end)
        if stop_ms is None:
            self._forget_turn()
        return waveform

    def clear(self) -> None:
        """Forget what is in the buffer."""
        self._drop(self._size)
        self._forget_turn()

    def trim(self) -> None:
        """Forget silence that no turn will need."""
        if self._detector and not self._detector.speaking:
            kept = (self._padding_ms + MARGIN_MS) * self.form.sample_rate // 1000
            self._drop(max(0, self._size - kept))

    def _forget_turn(self) -> None:
        if self._detector:
            self._detector.reset()

    def _index(self, at_ms: float | None, otherwise: int) -> int:
        if at_ms is None:
            return otherwise
        index = round((at_ms - self._begin_ms) * self.form.sample_rate / 1000)
        return min(max(index, 0), self._size)

    def _drop(self, end: int) -> None:
        self._begin_ms += end * 1000 / self.form.sample_rate
        self._pieces = [self._whole()[end:].copy()]
        self._size = self._pieces[0].size

    def _whole(self) -> NDArray[np.float32]:
        return np.concatenate([np.zeros(0, np.float32), *self._pieces])
