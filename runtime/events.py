"""What the engine tells while it answers: events in the order in which they happen, and the reply at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one round. rtf: token2wav seconds a second of speech, 0 without speech."""

    encode_s: float
    ttft_s: float  # from the question to the first token
    ttfa_s: float  # from the question to the first samples, 0 without speech
    decode_s: float  # from the first token to the last
    tokens_per_s: float
    token2wav_s: float
    rtf: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answered in one round."""

    text: str
    tokens: list[int]  # all generated ids, the stop token included
    audio_codes: list[int]
    waveform: NDArray[np.float32]  # [N] at sample_rate; empty without speech
    sample_rate: int
    stop_reason: str  # "stop", "length" (max_new_tokens) or "context" (the context is full)
    prompt_tokens: int
    placeholders: int
    timing: Timing
    warnings: tuple[str, ...] = ()  # what is odd about the question's audio, by Session, and about the reply


@dataclass(frozen=True, slots=True)
class Ticket:
    """A question that was submitted; engines count them."""

    number: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a question."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Text(Event):
    """More text of the reply. All pieces together are Reply.text."""

    text: str


@dataclass(frozen=True, slots=True)
class Codes(Event):
    """More audio codes of the reply, as they are generated."""

    codes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """A piece of work on speech is done: of `stage`, `done` of `total`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Audio(Event):
    """More samples of the reply, [n] at 24 kHz. All pieces together are Reply.waveform."""

    samples: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Done(Event):
    """The reply is complete: the last event of its ticket."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The reply ended before it was complete: the last event of its ticket. The dialogue is as it was before."""

    error: Exception
