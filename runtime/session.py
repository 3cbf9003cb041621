"""A dialogue as a person sees it: ask, and hear the reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.engine import Dialogue, Engine
from covo_npu.runtime.events import Audio, Done, Event, Failed, Progress, Reply, Text
from covo_npu.runtime.model import CovoAudio
from covo_npu.runtime.options import Ask, SpeechBlocks

OnProgress = Callable[[str, int, int], None]  # (stage, pieces done, pieces in all)


class Session:
    """One dialogue with a model. Sessions of one model may be used from different threads, one thread each."""

    def __init__(
        self, model: CovoAudio, ask: Ask | None = None, *, engine: Engine | None = None, **fields: Any
    ) -> None:
        """ask: how questions are answered, by its fields or as a whole; engine: where, by default in one of its own."""
        self.ask = replace(ask or Ask(), **fields)
        if self.ask.speaks:
            model.require_speech()
        self.model, self.engine = model, engine or Engine(model)
        self.dialogue = Dialogue()

    def say(
        self,
        source: Any,
        sample_rate: int | None = None,
        on_text: Callable[[str], None] | None = None,
        on_progress: OnProgress | None = None,
        on_audio: Callable[[NDArray[np.float32]], object] | None = None,
    ) -> Reply:
        """Return the reply to one spoken question, and remember the round.

        source: path of an audio file, an open one, its bytes, or samples [N] or [N, channels] with their sample_rate;
        on_text gets the text as it is generated, on_progress (stage, done, total) while speech is made, on_audio its
        samples [n] at 24 kHz. Raises AudioError or ContextError and leaves the dialogue as it was; CovoError if the
        question was cancelled from elsewhere.
        """
        reply = None
        for event in self._events(source, sample_rate, self.ask):
            if isinstance(event, Text) and on_text:
                on_text(event.text)
            elif isinstance(event, Progress) and on_progress:
                on_progress(event.stage, event.done, event.total)
            elif isinstance(event, Audio) and on_audio:
                on_audio(event.samples)
            elif isinstance(event, Done):
                reply = event.reply
        if reply is None:
            raise CovoError("the question was cancelled before its reply was there")
        return reply

    def stream(self, source: Any, sample_rate: int | None = None) -> Iterator[Event]:
        """Yield the events of the reply to one spoken question as they happen; the last one is Done.

        Speech comes as Audio events while the reply is generated, in the ask's blocks or else in the usual ones. Raises
        what say() raises. Who leaves the iteration early cancels the question: the dialogue is as it was before.
        """
        return self._events(source, sample_rate, replace(self.ask, blocks=self.ask.blocks or SpeechBlocks()))

    def _events(self, source: Any, sample_rate: int | None, ask: Ask) -> Iterator[Event]:
        warnings: list[str] = []
        waveform = self.model.waveform(source, sample_rate, warnings.append)
        for event in self.engine.drain(self.engine.submit(self.dialogue, waveform, ask)):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done):
                event = replace(event, reply=replace(event.reply, warnings=(*warnings, *event.reply.warnings)))
            yield event
