"""What covo-run keeps of a round, in one dialogue and in many: its speech as a WAV file, the rest as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from covo_npu.runtime.audio import write_wav
from covo_npu.runtime.session import Reply


def write_speech(reply: Reply, path: Path) -> bool:
    """Return whether there is speech, after writing it to `path`. Raises AudioError if that cannot be written."""
    if reply.waveform.size:
        write_wav(path, reply.waveform, reply.sample_rate)
    return bool(reply.waveform.size)


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
        "timing": dataclasses.asdict(reply.timing),
    }
