"""Speech in a thread of its own: replies are spoken while others are decoded, and while their own codes arrive.

The thread works in small pieces: one evaluation of flow matching, or one piece of the vocoder. Before each it looks
whose listener runs dry first: that reply's piece is next (earliest deadline first).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from covo_npu.kernels.device import accelerator
from covo_npu.runtime.audio import SAMPLE_RATE
from covo_npu.runtime.events import Audio, Event, Failed, Progress, Ticket
from covo_npu.runtime.model import CovoAudio
from covo_npu.runtime.options import CODES_PER_S, WHOLE, Ask
from covo_npu.runtime.speech import SpeechStream

WAIT_S = 0.05  # how long events() waits at most
IDLE_S = 1.0  # how long the thread waits for codes; it does not outlive an engine that nobody steps any more


@dataclass(frozen=True, slots=True)
class Spoken(Event):
    """All samples of a reply are there: the last event of its ticket. seconds: what they took."""

    seconds: float


@dataclass(slots=True, eq=False)
class _Speech:
    """One reply. `codes` and `ended` change under the lock; the stream and its work are the speaker's thread's own."""

    ticket: Ticket
    ask: Ask
    seed: int
    codes: list[int] = field(default_factory=list)  # that its stream has not got
    num_codes: int = 0  # so far
    ended: bool = False
    due: float = 0.0  # when its listener runs dry, as time.perf_counter tells it
    stream: SpeechStream | None = None
    work: Iterator[Tensor] | None = None  # on the block that is being spoken
    seconds: float = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a piece is to be computed, or codes are to be looked at."""
        return bool(self.work or self.codes or self.ended or (self.stream and self.stream.ready))


class Speaker:
    """Speaks replies side by side. The thread starts with the first codes and ends when there is no reply."""

    def __init__(self, model: CovoAudio) -> None:
        self._model = model
        self._changed = threading.Condition()
        self._speeches: dict[Ticket, _Speech] = {}
        self._thread: threading.Thread | None = None
        self._told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stream: Any = None  # the accelerator's

    def begin(self, ticket: Ticket, ask: Ask, seed: int) -> None:
        """Expect the codes of a reply; events() tells of its speech."""
        with self._changed:
            self._speeches[ticket] = _Speech(ticket, ask, seed)

    def push(self, ticket: Ticket, codes: Sequence[int]) -> None:
        """Let more codes of a reply be spoken. Does nothing for one that failed."""
        with self._changed:
            if speech := self._speeches.get(ticket):
                speech.due = speech.due or time.perf_counter()
                speech.codes += codes
                speech.num_codes += len(codes)
                self._wake()

    def end(self, ticket: Ticket) -> None:
        """No more codes of a reply follow. Does nothing for one that failed."""
        with self._changed:
            if speech := self._speeches.get(ticket):
                speech.ended = True
                if not (
                    speech.ask.blocks or WHOLE
                ).sizes:  # nobody listens yet: late is what took longer than to hear it
                    speech.due = time.perf_counter() + speech.num_codes / CODES_PER_S
                self._wake()

    def cancel(self, ticket: Ticket) -> None:
        """Speak no more of a reply than the piece that is being computed."""
        with self._changed:
            self._speeches.pop(ticket, None)
            self._changed.notify()

    def events(self, wait: bool) -> Iterator[Event]:
        """Yield what has happened since the last call. wait: for a moment, if nothing has."""
        with contextlib.suppress(queue.Empty):
            if wait:
                yield self._told.get(timeout=WAIT_S)
            while True:
                yield self._told.get_nowait()

    # --- the thread

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="speaker")
            self._thread.start()
        self._changed.notify()

    def _run(self) -> None:
        device = self._model.devices.speech
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if device.type != "cpu":  # a stream of its own: decode steps do not queue up behind speech
                module = accelerator(device)
                module.set_device(device)
                self._stream = self._stream or module.Stream(device)
                stack.enter_context(module.stream(self._stream))
            while self._piece():
                pass

    def _piece(self) -> bool:
        """Do the most urgent piece of work and tell what came of it. Returns False if the thread is to end."""
        with self._changed:
            while not (urgent := [speech for speech in self._speeches.values() if speech.has_work]):
                if not self._speeches or not self._changed.wait(IDLE_S):
                    self._thread = None
                    return False
            speech = min(urgent, key=lambda speech: speech.due)
            codes, ended, speech.codes = speech.codes, speech.ended, []
        started = time.perf_counter()
        try:
            samples = self._next(speech, codes, ended)
            speech.seconds += time.perf_counter() - started
        except Exception as error:  # noqa: BLE001 - carried to whoever waits for the reply
            self.cancel(speech.ticket)
            self._told.put(Failed(speech.ticket, error))
            return True
        if samples.numel():
            self._told.put(Audio(speech.ticket, samples.numpy()))
            speech.due = max(speech.due, time.perf_counter()) + samples.numel() / SAMPLE_RATE
        if speech.stream and speech.stream.over and speech.work is None:
            self.cancel(speech.ticket)
            self._told.put(Spoken(speech.ticket, speech.seconds))
        return True

    def _next(self, speech: _Speech, codes: Sequence[int], ended: bool) -> Tensor:
        """Return the samples [n] of the next piece of work, on the host; none of an evaluation."""
        if speech.stream is None:
            speech.stream = self._open(speech)
        if codes:
            speech.stream.take(codes)
        if ended:
            speech.stream.end()
        if speech.work is None and speech.stream.ready:
            speech.work = speech.stream.work()
        samples = next(speech.work, None) if speech.work else None
        if samples is None:
            speech.work = None
            return torch.zeros(0)
        if self._stream:  # a step of the decoder never waits for more than one piece
            self._stream.synchronize()
        return samples.cpu()

    def _open(self, speech: _Speech) -> SpeechStream:
        def progress(stage: str, done: int, total: int) -> None:
            self._told.put(Progress(speech.ticket, stage, done, total))

        ask = speech.ask
        return self._model.speech_stream(
            ask.blocks or WHOLE, speech.seed, on_progress=progress, voice=ask.voice, flow=ask.flow
        )
