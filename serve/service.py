"""What all requests of one server share."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol, TypeVar

from covo_npu.runtime import audio
from covo_npu.runtime.engine import ContextError, Engine
from covo_npu.runtime.options import Ask, Mode
from covo_npu.runtime.prompt import DEFAULT_SYSTEM_PROMPT
from covo_npu.serve.errors import ApiError, invalid, told, unsupported
from covo_npu.serve.metrics import Metrics
from covo_npu.serve.security import Secrets
from covo_npu.serve.settings import Settings
from covo_npu.serve.worker import DRAINING, FAILED, Worker

DEFAULT_VOICE = "default"
# What clients of OpenAI ask for, who must name a voice: the default one here.
OPENAI_VOICES = frozenset(
    ("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse")
)
OPENAI_NAMES = {"max_new_tokens": "max_completion_tokens"}  # of settings that have another name with us
AUDIO_THREADS = 4  # that decode and encode audio beside the engine

T = TypeVar("T")


class Ending(Protocol):
    """What can be asked to end."""

    def end(self) -> None:
        """End when what is under way has."""


class Service:
    """The worker, the settings, and what is known of clients."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.model, self.settings, self.metrics = engine.model, settings, Metrics()
        self.worker = Worker(engine, settings, self.metrics)
        self.secrets = Secrets(settings.api_keys)
        self.created = int(time.time())
        self.max_seconds = audio.max_seconds(self.model.max_context, self.model.config.adapter.num_layers)
        self._pool = ThreadPoolExecutor(AUDIO_THREADS, "audio")
        self.sessions: set[Ending] = set()  # realtime sessions that are open
        self.metrics.watch({"realtime_sessions": ("Open realtime sessions", lambda: len(self.sessions))})

    @cached_property
    def max_system_characters(self) -> int:
        """How many characters a system prompt has at most. Goes through the vocabulary: no start waits for that."""
        return self.model.tokenizer.max_characters(self.model.max_context)

    @property
    def name(self) -> str:
        """What the model calls itself."""
        return self.settings.model_names[0]

    @property
    def voices(self) -> list[str]:
        """Names of the voices, the default one first; none if the server has no speech."""
        return list(dict.fromkeys((DEFAULT_VOICE, *self.settings.voices))) if self.model.num_codes else []

    async def compute(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function gives that would hold up the event loop: it runs in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def require_model(self, name: str) -> None:
        """Raise ApiError unless a client may call the model so."""
        if name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            raise ApiError(404, f"the model {name!r} is not here; there is: {known}", "model_not_found", "model")

    def ask(
        self,
        speaks: bool,
        system: str | None,
        voice: str | None,
        sampling: Mapping[str, float | None],
        others: Mapping[str, int | None],
        streams: bool,
    ) -> Ask:
        """Return how a question is answered: as the server's own settings say, but for what a request says.

        others: max_new_tokens and seed; None everywhere: nothing is said; streams: it is sent while it is made. Raises
        ApiError.
        """
        usual = self.settings.ask
        if speaks and not self.model.can_speak:
            raise unsupported("modalities", "this server was started without speech: ask for text only")
        mode: Mode = "a2ta" if speaks else "a2t"
        try:
            chosen = dataclasses.replace(usual.sampling, **_said(sampling))
            ask = dataclasses.replace(usual, mode=mode, sampling=chosen, system=self.system(system), **_said(others))
        except ValueError as error:
            name = re.match(r"\w+", str(error))
            param = name and OPENAI_NAMES.get(name[0], name[0])
            raise invalid(param, str(error)) from None
        if not speaks:
            return ask
        return dataclasses.replace(ask, voice=self._voice(voice), blocks=self.settings.blocks if streams else None)

    def system(self, text: str | None) -> str:
        """Return the prompt that a dialogue begins with. text: what a request says, or None.

        Raises ApiError for one that cannot fit: to count its tokens would hold up the engine's thread, and everybody.
        """
        if text is not None and len(text) > self.max_system_characters:
            message = (
                f"the system prompt has {len(text)} characters, the context of {self.model.max_context} tokens holds "
                f"{self.max_system_characters} at most: say less, or load with a larger max_context (--max-context)"
            )
            raise told(ContextError(message))
        usual = self.settings.ask.system
        return text if text is not None else usual if usual is not None else DEFAULT_SYSTEM_PROMPT

    def _voice(self, name: str | None) -> Any:
        voices = self.settings.voices
        if name is not None and name in voices:
            return voices[name]
        if name is None or name == DEFAULT_VOICE or name in OPENAI_VOICES:
            return voices.get(DEFAULT_VOICE, self.settings.ask.voice)
        known = ", ".join(self.voices)
        raise invalid("audio.voice", f"there is no voice {name!r}; there is: {known}")

    async def drain(self, forced: Callable[[], bool] = lambda: False) -> None:
        """Take no more requests and wait for those under way, until it takes too long, or is forced to end."""
        if self.worker.state != FAILED:
            self.worker.state = DRAINING
        for session in list(self.sessions):
            session.end()
        end = time.monotonic() + self.settings.drain_s
        while self.worker.busy and time.monotonic() < end and not forced():
            await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(None, self.worker.stop)  # the others hear that it ends

    def close(self) -> None:
        """End the worker's thread and the others."""
        self.worker.stop()
        self._pool.shutdown(cancel_futures=True)


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
