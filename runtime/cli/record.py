"""What covo-run keeps of a round, in one dialogue and in many: its speech as a WAV file, the rest as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covo_npu.runtime import output
from covo_npu.runtime.audio import AudioError
from covo_npu.runtime.events import Reply
from covo_npu.runtime.wav import WavFile, wav_bytes


class GrowingSpeech:
    """The WAV file of speech that is written while it is made. The first fault ends the writing, not the reply."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._file = WavFile(output.fitting(folder, stem, ".wav"))
        self.fault = ""

    @property
    def path(self) -> Path:
        """Return where it is."""
        return self._file.path

    def write(self, samples: NDArray[np.float32]) -> None:
        """Append samples [n], or note why that cannot be done."""
        if not self.fault:
            try:
                self._file.write(samples)
            except AudioError as error:
                self.fault = str(error)

    def __enter__(self) -> GrowingSpeech:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def write_speech(
    reply: Reply, folder: Path, stem: str, suffix: str = ".wav", growing: GrowingSpeech | None = None
) -> tuple[Path | None, str]:
    """Return where the speech was written, None if there is none; and why that is not in the folder, "" if it is.

    A file that is there is left alone: the new one gets a number. growing: what was written of it while it was made.
    """
    if not reply.waveform.size:
        return None, ""
    if growing and not growing.fault:
        return growing.path, ""
    path, fault = output.keep(output.fitting(folder, stem, suffix), wav_bytes(reply.waveform, reply.sample_rate))
    if growing and not fault:
        fault = f"{growing.fault}; the whole reply is in {path}"
    return path, fault


def round_record(question: str, reply: Reply, wav: str | None) -> dict[str, Any]:
    """Return the JSON object of a round. wav: where its speech is, None without speech."""
    return {
        "input": question,
        "prompt_tokens": reply.prompt_tokens,
        "placeholders": reply.placeholders,
        "tokens": reply.tokens,
        "text": reply.text,
        "audio_codes": reply.audio_codes,
        "stop_reason": reply.stop_reason,
        "wav": wav,
        "samples": int(reply.waveform.size),
        "warnings": list(reply.warnings),
        "timing": dataclasses.asdict(reply.timing),
    }
