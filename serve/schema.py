"""What requests over HTTP and realtime events have in common, and what a client is told of one that does not fit."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError

from covo_npu.kernels.errors import listed
from covo_npu.serve.errors import ApiError, invalid

SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "window_penalty", "window")  # fields of Sampled


class Model(BaseModel):
    """What is read of an object; what else is in it is not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class Sampled(Model):
    """How a reply is sampled, by the names of options.Sampling. Those after top_p are this project's own."""

    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    window_penalty: float | None = None
    window: int | None = None


class Named(Model):
    """Something that is named by its id."""

    id: str


def kind(value: Any) -> str:
    """Return the tag of one of two forms that a value may have."""
    return "<text>" if isinstance(value, str) else "<other>"


Voice = Annotated[Annotated[str, Tag("<text>")] | Annotated[Named, Tag("<other>")], Discriminator(kind)]


def voice_name(voice: str | Named | None) -> str | None:
    """Return the name of a voice, however it is said."""
    return voice.id if isinstance(voice, Named) else voice


def misread(error: ValidationError, at: str = "") -> ApiError:
    """Return what a client is told of an object that does not fit: all that is wrong, and where the first of it is."""
    faults = error.errors(include_url=False, include_input=False)
    told_of = [": ".join(filter(None, (_path(at, fault["loc"]), fault["msg"]))) for fault in faults]
    code = "missing_required_parameter" if faults[0]["type"] == "missing" else "invalid_type"
    return invalid(_path(at, faults[0]["loc"]) or None, listed(told_of), code)


def _path(path: str, location: tuple[int | str, ...]) -> str:
    """Return messages[0].content for ("messages", 0, "content", "<text>"), after a path that leads there."""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step}" if path else step
    return path
