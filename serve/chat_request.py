"""A request for a chat completion, as OpenAI's clients send it: what it says, and what of it this model can do."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationError
from torch import Tensor

from covo_npu.kernels.errors import listed
from covo_npu.runtime import audio
from covo_npu.runtime.options import Ask
from covo_npu.serve.errors import invalid, told, unsupported
from covo_npu.serve.formats import DATA, HEARD, PCM16, SPOKEN, decode, from_base64
from covo_npu.serve.schema import SAMPLING, Model, Named, Sampled, Voice, kind, misread, voice_name
from covo_npu.serve.service import Service

log = logging.getLogger(__name__)


class InputAudio(Model):
    """Audio in base64, or as a data: address."""

    data: str
    format: str


class Address(Model):
    """An address; only data: is looked at."""

    url: str


class Part(Model):
    """A part of a message."""

    type: str
    text: str | None = None
    input_audio: InputAudio | None = None
    audio_url: Address | None = None


Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<other>")], Discriminator(kind)]


class Message(Model):
    """A message of the dialogue."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    audio: Named | None = None


class SpokenAudio(Model):
    """How speech is wanted."""

    format: str
    voice: Voice | None = None


class StreamOptions(Model):
    """What else a stream tells."""

    include_usage: bool | None = None


class ChatRequest(Sampled):
    """The body of POST /v1/chat/completions, as far as it is looked at."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str
    messages: list[Message] = Field(min_length=1)
    modalities: list[Literal["text", "audio"]] | None = None
    audio: SpokenAudio | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None


RAW = ("audio/pcm", "audio/l16", "audio/pcmu", "audio/pcma")  # samples that no container describes
PCM_PARAMETERS = frozenset(("rate=24000", "channels=1", "base64"))  # of audio/pcm as it is heard: PCM16
NOTHING: tuple[Any, ...] = (None, [], {}, "")
# What would change the reply, and this model cannot do: what it may say, and why not else.
CANNOT: dict[str, tuple[Sequence[Any], str]] = {
    "n": ((None, 1), "one reply a request"),
    "tools": (NOTHING, "this model calls no tools"),
    "functions": (NOTHING, "this model calls no functions"),
    "tool_choice": ((None, "none", "auto"), "this model calls no tools"),
    "function_call": ((None, "none", "auto"), "this model calls no functions"),
    "logprobs": ((None, False), "log probabilities are not kept"),
    "top_logprobs": ((None, 0), "log probabilities are not kept"),
    "logit_bias": (NOTHING, "tokens cannot be favoured one by one"),
    "frequency_penalty": ((None, 0), "use repetition_penalty, window_penalty and window"),
    "presence_penalty": ((None, 0), "use repetition_penalty"),
    "stop": (NOTHING, "a reply ends where the model ends it, or at max_completion_tokens"),
    "response_format": ((None, {"type": "text"}), "replies are plain text, or text and speech"),
    "prediction": (NOTHING, "replies are not predicted"),
    "web_search_options": ((None,), "this model searches nothing"),
}
IGNORED = frozenset(
    ("metadata", "moderation", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options",
     "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store", "user", "verbosity")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat completion that can be answered."""

    model: str  # what the client calls it
    ask: Ask
    waveform: Tensor  # [N] at 24 kHz, prepared
    stream: bool
    include_usage: bool
    format: str  # of speech
    system: str | None  # what the request says of the system prompt
    after: str | None  # name of the reply that it follows; None: a new dialogue
    after_param: str  # where that stands in the request
    history: str  # name of all that comes before the reply


def read_chat(body: bytes, service: Service) -> Chat:
    """Return what a request asks for. Raises ApiError."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise misread(error) from None
    service.require_model(request.model)
    _require_possible(request.model_extra or {})
    speaks, form = _speech(request)
    voice = request.audio.voice if request.audio else None
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    begin, system = _system(request.messages)
    ask = service.ask(
        speaks,
        system,
        voice_name(voice),
        {name: getattr(request, name) for name in SAMPLING},
        {"max_new_tokens": limit, "seed": request.seed},
        streams=bool(request.stream),
    )
    history, after, after_param = _name(ask.system or ""), None, ""
    question: list[tuple[str, str, str]] = []  # parts after the last reply
    answered = max((n for n, message in enumerate(request.messages) if message.role == "assistant"), default=-1)
    for n, message in enumerate(request.messages[begin:], begin):
        where = f"messages[{n}]"
        if message.role == "assistant":
            history, after, after_param = _reply(history, message, where)
        elif message.role == "user":
            parts = _audio_parts(message, where)
            history = _name(history, *(data for data, _, _ in parts))
            if n > answered:
                question += parts
        else:
            raise unsupported(where, f"messages of role {message.role!r} are only possible at the beginning, as system")
    if not question:
        raise invalid("messages", "the last message has to be the user's spoken question, an input_audio part")
    options = request.stream_options
    return Chat(
        model=request.model,
        ask=ask,
        waveform=_heard(question, service.max_seconds),
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        format=form,
        system=system,
        after=after,
        after_param=after_param,
        history=history,
    )


def reply_name(history: str, text: str) -> str:
    """Return the name by which a reply is found whose client sends back its text and not its audio's id."""
    return _name(history, text)


def _name(*pieces: str) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(hashlib.sha256(piece.encode("utf-8", "surrogatepass")).digest())
    return f"history_{digest.hexdigest()}"


def _reply(history: str, message: Message, where: str) -> tuple[str, str, str]:
    """Return the name of the history with an earlier reply, the name of that reply, and what in the request has it."""
    if message.audio is not None:
        return _name(history, message.audio.id), message.audio.id, f"{where}.audio.id"
    text = message.content if isinstance(message.content, str) else "".join(p.text or "" for p in message.content or ())
    if not text:
        raise invalid(where, "an earlier reply needs the id of its audio, or its text as content")
    name = reply_name(history, text)
    return name, name, f"{where}.content"


def _system(messages: Sequence[Message]) -> tuple[int, str | None]:
    """Return how many messages at the beginning are system prompts, and their text."""
    texts = []
    for n, message in enumerate(messages):
        if message.role not in ("system", "developer"):
            break
        parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content or []
        if wrong := next((part for part in parts if part.type != "text" or part.text is None), None):
            raise unsupported(f"messages[{n}].content", f"a system prompt is text, found a part of type {wrong.type!r}")
        texts.append("".join(part.text or "" for part in parts))
    return len(texts), "\n\n".join(texts) if texts else None


def _audio_parts(message: Message, where: str) -> list[tuple[str, str, str]]:
    """Return (base64, format, where) of the audio of a user's message."""
    if isinstance(message.content, str):
        raise unsupported(f"{where}.content", "this model answers spoken questions: send an input_audio part, not text")
    found = []
    for n, part in enumerate(message.content or ()):
        place = f"{where}.content[{n}]"
        if part.type == "input_audio" and part.input_audio:
            if part.input_audio.format not in HEARD:
                known = ", ".join(HEARD)
                raise unsupported(f"{place}.input_audio.format", f"expected one of {known}")
            data, at = part.input_audio.data, f"{place}.input_audio.data"
            if data.startswith(DATA):  # the form is said beside it; the address may say that it is misheard
                _media_form(data, at)
            found.append((data, part.input_audio.format, at))
        elif part.type == "audio_url" and part.audio_url:
            url, at = part.audio_url.url, f"{place}.audio_url.url"
            if not url.startswith(DATA):
                raise unsupported(at, "addresses are not fetched: send the audio itself as data:")
            found.append((url, _media_form(url, at), at))
        elif part.type != "text" or (part.text or "").strip():
            rule = "a question is audio alone; put what else the model should know into a system message"
            raise unsupported(place, f"{rule}, found a part of type {part.type!r}")
    if not found:
        raise invalid(f"{where}.content", "expected an input_audio part")
    return found


def _media_form(address: str, where: str) -> str:
    """Return which of HEARD a data: address holds. Raises ApiError for samples that would be heard as others.

    Containers are told apart by their own bytes, whatever the address calls them.
    """
    media = address.partition(",")[0].removeprefix(DATA).lower().replace(" ", "")
    name, *parameters = media.split(";")
    if name not in RAW:
        return HEARD[0]
    if name != RAW[0] or not PCM_PARAMETERS.issuperset(parameters):
        rule = "samples without a container are audio/pcm, 16-bit little-endian mono at 24 kHz; send others as wav"
        raise unsupported(where, f"{rule}, found {media[:80]!r}")
    return PCM16


def _heard(parts: Sequence[tuple[str, str, str]], max_seconds: float) -> Tensor:
    """Return (base64, format, where) of a question's parts as one waveform [N]. Raises ApiError naming a part.

    max_seconds: of all parts together; what is beyond it is not decoded.
    """
    heard: list[Tensor] = []
    seconds = 0.0
    for data, form, where in parts:
        source = f"{where}, after {seconds:.1f} s of other parts" if heard else where
        try:
            heard.append(decode(from_base64(data, source), form, source, max(0.0, max_seconds - seconds)))
        except audio.AudioError as error:
            raise told(error, where) from None
        seconds += len(heard[-1]) / audio.SAMPLE_RATE
    return torch.cat(heard)


def _speech(request: ChatRequest) -> tuple[bool, str]:
    """Return whether the reply is spoken, and in which format."""
    asked = request.modalities
    speaks = "audio" in asked if asked is not None else request.audio is not None
    if not speaks:
        return False, ""
    if request.audio is None:
        raise invalid("audio", "speech needs audio: {format, voice}", "missing_required_parameter")
    form = request.audio.format
    if form not in SPOKEN:
        raise unsupported("audio.format", f"expected one of {', '.join(SPOKEN)}, found {form!r}")
    if request.stream and form != PCM16:
        raise unsupported("audio.format", f"a stream of speech is {PCM16}: 16-bit mono at 24 kHz; found {form!r}")
    return True, form


def _require_possible(extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        possible, why = CANNOT.get(name, ((value,), ""))
        if value not in possible:
            raise unsupported(name, f"{name}: {why}")
    if unknown := sorted(extra.keys() - CANNOT.keys() - IGNORED):
        log.info("ignored of a request: %s", listed([ascii(name[:40]) for name in unknown], separator=", "))
