"""What a server may be told, and every default: the only home of its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from covo_npu.runtime.options import Ask, SpeechBlocks, require

if TYPE_CHECKING:
    from covo_npu.runtime.voice import Voice

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What covo-serve offers, to whom, and how much of it.

    ask: how questions are answered that say nothing else; voices: by name, beside the default one, or in its place;
    model_names: what clients may call the model, the first is its own; origins: pages of other servers that may use
    this one; trusted: whoever reaches the server may use it without a key, under any host name; session_header: by
    which a router in front keeps a dialogue at one of several replicas, None: there is one server.
    """

    ask: Ask = field(default_factory=Ask)
    blocks: SpeechBlocks = field(default_factory=SpeechBlocks)  # how speech is cut that is sent while it is made
    voices: Mapping[str, Voice] = field(default_factory=dict)
    model_names: tuple[str, ...] = ("covo-audio-chat",)
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    trusted: bool = False
    slots: int = 8  # dialogues answered side by side
    queue: int = 16  # questions that wait for a slot
    sessions: int = 64  # realtime connections
    max_body_bytes: int = 32 * MIB  # of a request; 8 minutes of 24 kHz PCM in base64
    parked_bytes: int = 4096 * MIB  # of host memory for dialogues between two questions
    keep_s: float = 3600.0  # how long a dialogue is kept after its last reply
    idle_s: float = 300.0  # how long a realtime session may say nothing
    session_s: float = 3600.0  # how long it may last
    drain_s: float = 60.0  # how long replies under way may take after SIGTERM
    body_idle_s: float = 10.0  # how long a sender may send nothing of a request
    body_s: float = 300.0  # how long a request may take to arrive
    session_header: str | None = None

    def __post_init__(self) -> None:
        positive = ("slots", "sessions", "max_body_bytes", "keep_s", "idle_s", "session_s", "body_idle_s")
        require(
            (bool(self.model_names) and all(self.model_names), "model_names", "names", self.model_names),
            (all(self.api_keys), "api_keys", "no empty texts", self.api_keys),
            (self.queue >= 0, "queue", "at least 0", self.queue),
            (self.parked_bytes >= 0, "parked_bytes", "at least 0", self.parked_bytes),
            (self.drain_s >= 0, "drain_s", "at least 0", self.drain_s),
            *((getattr(self, name) > 0, name, "positive", getattr(self, name)) for name in positive),
        )

    @property
    def places(self) -> int:
        """Requests that are taken in at a time, from the first byte of their bodies to the last of their replies."""
        return self.slots + self.queue


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many replicas of the server run. max_replicas: as many under load, None: never more."""

    replicas: int = 1
    max_replicas: int | None = None
    upscale_s: float = 30.0  # how long there must be too few before one is added
    downscale_s: float = 600.0  # how long too many, before one goes

    def __post_init__(self) -> None:
        most, least = self.max_replicas, self.replicas
        require(
            (least >= 1, "replicas", "at least 1", least),
            (most is None or most >= least, "max_replicas", f"at least the replicas, {least}", most),
            (self.upscale_s >= 0, "upscale_s", "at least 0", self.upscale_s),
            (self.downscale_s >= 0, "downscale_s", "at least 0", self.downscale_s),
        )
