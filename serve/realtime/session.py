"""How a realtime session is set: what clients may say of it, in the spelling of today and of the beta, and its echo."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError

from covo_npu.runtime.audio import SAMPLE_RATE
from covo_npu.serve.errors import invalid, unsupported
from covo_npu.serve.schema import SAMPLING, Model, Sampled, Voice, kind, misread, voice_name
from covo_npu.serve.service import DEFAULT_VOICE, Service

log = logging.getLogger(__name__)

Limit = Annotated[Annotated[int, Tag("<other>")] | Annotated[Literal["inf"], Tag("<text>")], Discriminator(kind)]
Encoding = Literal["audio/pcm", "audio/pcmu", "audio/pcma"]
PCM: Encoding = "audio/pcm"
G711_RATE = 8_000
PCM_RATES = (SAMPLE_RATE, 16_000)  # of input; OpenAI knows the first only
OWN = (*SAMPLING, "seed")  # this project's settings of how a question is answered
# The beta's flat names, and where they stand today.
BETA_PATHS: dict[str, tuple[str, ...]] = {
    "modalities": ("output_modalities",),
    "max_response_output_tokens": ("max_output_tokens",),
    "input_audio_format": ("audio", "input", "format"),
    "input_audio_transcription": ("audio", "input", "transcription"),
    "input_audio_noise_reduction": ("audio", "input", "noise_reduction"),
    "turn_detection": ("audio", "input", "turn_detection"),
    "output_audio_format": ("audio", "output", "format"),
    "voice": ("audio", "output", "voice"),
    "speed": ("audio", "output", "speed"),
}
BETA_FORMATS = {"pcm16": PCM, "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}


class TurnDetection(Model):
    """When the server thinks that a turn is over."""

    type: Literal["server_vad", "semantic_vad"]
    threshold: float = Field(default=0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(default=300, ge=0, le=10_000)
    silence_duration_ms: int = Field(default=500, ge=32, le=60_000)
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: int | None = None


class Format(Model):
    """An encoding of audio without a container."""

    type: Encoding
    rate: int | None = None

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return G711_RATE if self.type != PCM else self.rate or SAMPLE_RATE


class Input(Model):
    """Of what is heard. The last two are accepted and left undone."""

    format: Format | None = None
    turn_detection: TurnDetection | None = None
    transcription: Any = None
    noise_reduction: Any = None


class Output(Model):
    """Of what is spoken."""

    format: Format | None = None
    voice: Voice | None = None
    speed: float | None = None


class Audio(Model):
    """Of both."""

    input: Input = Field(default_factory=Input)
    output: Output = Field(default_factory=Output)


class Asked(Sampled):
    """What session.update may say of a session, and response.create of one response."""

    type: str | None = None
    model: str | None = None
    output_modalities: list[Literal["text", "audio"]] | None = None
    instructions: str | None = None
    max_output_tokens: Limit | None = None
    audio: Audio = Field(default_factory=Audio)
    tools: list[Any] | None = None
    prompt: Any = None
    conversation: str | None = None
    input: list[Any] | None = None
    metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What holds for a session, or for one of its responses."""

    model: str
    instructions: str
    speaks: bool = True
    max_output_tokens: int | None = None  # None: as many as the server's own setting says
    input_format: Format = field(default_factory=lambda: Format(type=PCM, rate=SAMPLE_RATE))
    turn_detection: TurnDetection | None = field(default_factory=lambda: TurnDetection(type="server_vad"))
    voice: str | None = None
    own: Mapping[str, float | None] = field(default_factory=dict)  # of OWN
    metadata: Mapping[str, str] | None = None

    @property
    def modalities(self) -> list[str]:
        """What OpenAI calls it: speech has its transcript with it."""
        return ["audio" if self.speaks else "text"]

    @property
    def limit(self) -> int | str:
        """Tokens of a response at most, or inf."""
        return "inf" if self.max_output_tokens is None else self.max_output_tokens

    @property
    def output(self) -> dict[str, Any]:
        """What is spoken, as an object of the protocol."""
        return {"format": {"type": PCM, "rate": SAMPLE_RATE}, "voice": self.voice or DEFAULT_VOICE}

    def echo(self, session_id: str, expires_at: int) -> dict[str, Any]:
        """Return the session object: all of it, as it holds."""
        form = self.input_format
        rate = {"rate": form.sample_rate} if form.type == PCM else {}
        heard = {
            "format": {"type": form.type, **rate},
            "noise_reduction": None,
            "transcription": None,
            "turn_detection": self.turn_detection and self.turn_detection.model_dump(),
        }
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": session_id,
            "model": self.model,
            "output_modalities": self.modalities,
            "instructions": self.instructions,
            "max_output_tokens": self.limit,
            "audio": {"input": heard, "output": {**self.output, "speed": 1.0}},
            "tools": [],
            "tool_choice": "none",
            "truncation": "disabled",
            "tracing": None,
            "include": None,
            "prompt": None,
            "expires_at": expires_at,
            **{name: value for name, value in self.own.items() if value is not None},
        }


def usual(service: Service, model: str) -> SessionSettings:
    """Return the settings of a session that says nothing. Raises ApiError if the model is not here."""
    service.require_model(model)
    return SessionSettings(model, service.system(None), speaks=service.model.can_speak)


def updated(settings: SessionSettings, said: Any, service: Service, at: str) -> SessionSettings:
    """Return settings with what a client says of them; what it does not mention stays. Raises ApiError.

    at: where in the event it stands.
    """
    if not isinstance(said, dict):
        raise invalid(at, f"{at} has to be an object", "invalid_type")
    try:
        asked = Asked.model_validate(_without_beta(said))
    except ValidationError as error:
        raise misread(error, at) from None
    _require_possible(asked, settings, at)
    changes: dict[str, Any] = {}
    if asked.output_modalities is not None:
        changes["speaks"] = "audio" in asked.output_modalities
    if asked.instructions is not None:
        changes["instructions"] = asked.instructions
    if "max_output_tokens" in asked.model_fields_set:
        limit = asked.max_output_tokens
        changes["max_output_tokens"] = None if limit in (None, "inf") else limit
    heard, spoken = asked.audio.input, asked.audio.output
    if heard.format is not None:
        changes["input_format"] = heard.format
    if "turn_detection" in heard.model_fields_set:
        changes["turn_detection"] = heard.turn_detection
    if spoken.voice is not None:
        changes["voice"] = voice_name(spoken.voice)
    if asked.metadata is not None:
        changes["metadata"] = asked.metadata
    changes["own"] = {**settings.own, **{name: v for name in OWN if (v := getattr(asked, name)) is not None}}
    changed = replace(settings, **changes)
    ask_of(changed, service)  # what cannot be asked is told now
    return changed


def ask_of(settings: SessionSettings, service: Service) -> Any:
    """Return how a question of a session is answered. Raises ApiError."""
    own = settings.own
    return service.ask(
        settings.speaks,
        settings.instructions,
        settings.voice,
        {name: own.get(name) for name in SAMPLING},
        {"max_new_tokens": settings.max_output_tokens, "seed": own.get("seed")},  # type: ignore[dict-item]
        streams=True,
    )


def _without_beta(said: dict[str, Any]) -> dict[str, Any]:
    """Return what the beta's flat names say under today's, beside what is said under those."""
    said = _copy(said)
    for name, path in BETA_PATHS.items():
        if name in said:
            value, place = said.pop(name), said
            if isinstance(value, str) and path[-1] == "format":
                value = {"type": BETA_FORMATS.get(value, value)}
            if name == "modalities" and isinstance(value, list) and "audio" in value:
                value = ["audio"]  # which always had its text with it
            for step in path[:-1]:
                place = place.setdefault(step, {})
                if not isinstance(place, dict):
                    return said
            place.setdefault(path[-1], value)
    return said


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _require_possible(asked: Asked, settings: SessionSettings, at: str) -> None:
    heard, spoken, turns = asked.audio.input, asked.audio.output, asked.audio.input.turn_detection
    rates = ", ".join(map(str, PCM_RATES))
    checks = (
        (asked.type in (None, "realtime"), "type", "sessions are realtime sessions"),
        (asked.model in (None, settings.model), "model", "a session keeps its model"),
        (asked.output_modalities in (None, ["audio"], ["text"]), "output_modalities", 'expected ["audio"] or ["text"]'),
        (not asked.tools, "tools", "this model calls no tools"),
        (not asked.prompt, "prompt", "prompts are not kept here: use instructions"),
        (asked.conversation in (None, "auto"), "conversation", "a session has one conversation"),
        (not asked.input, "input", "a response answers what is in the conversation"),
        (_known(heard.format, PCM_RATES), "audio.input.format", f"PCM is heard at {rates} Hz, G.711 at {G711_RATE} Hz"),
        (
            _known(spoken.format, (SAMPLE_RATE,)) and (spoken.format is None or spoken.format.type == PCM),
            "audio.output.format",
            f"speech comes as {PCM} at {SAMPLE_RATE} Hz",
        ),
        (spoken.speed in (None, 1), "audio.output.speed", "speech comes at its own speed"),
        (turns is None or turns.type == "server_vad", "audio.input.turn_detection", "expected server_vad or null"),
        (
            turns is None or turns.idle_timeout_ms is None,
            "audio.input.turn_detection.idle_timeout_ms",
            "this model does not speak unasked",
        ),
    )
    for possible, name, why in checks:
        if not possible:
            raise unsupported(f"{at}.{name}", f"{name}: {why}")
    ignored = [name for name in ("transcription", "noise_reduction") if getattr(heard, name) is not None]
    if ignored:
        log.info("ignored of a session: %s", ", ".join(ignored))


def _known(form: Format | None, rates: tuple[int, ...]) -> bool:
    return form is None or form.sample_rate in (rates if form.type == PCM else (G711_RATE,))
