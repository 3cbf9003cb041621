"""The thread that owns the engine. The event loop gives it questions and moves what it tells; nothing else is shared.

Every call of the engine is made in that thread, between two steps. So the loop never waits for a step, and what it asks
for, a question's end above all, is done when the step under way is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import audio
from covo_npu.runtime.engine import Dialogue, Engine, Mark
from covo_npu.runtime.events import Audio, Done, Event, Failed, Reply, Text, Ticket
from covo_npu.runtime.options import Ask, Mode, SpeechBlocks
from covo_npu.runtime.ranks import RankError
from covo_npu.serve.dialogues import Dialogues
from covo_npu.serve.errors import ApiError
from covo_npu.serve.metrics import Meter, Metrics
from covo_npu.serve.settings import Settings

log = logging.getLogger(__name__)

STARTING, READY, DRAINING, FAILED = "starting", "ready", "draining", "failed"
MAX_UNREAD_SAMPLES = 300 * audio.SAMPLE_RATE  # of one reply that nobody takes: 29 MB
IDLE_S = 30.0  # how often a worker without work looks for dialogues that are too old
WARM_UP_TOKENS = 20  # one block of text and codes
WARM_UP_CODES = 15
WARM_UP_BLOCKS = 300  # codes of a reply in blocks of all usual lengths, where each has a graph of its own

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. Its functions are called in the worker's thread: the one to find the dialogue that it belongs to,
    the other to remember the reply when it is complete."""

    waveform: Tensor  # [N] at 24 kHz, prepared
    ask: Ask
    dialogue: Callable[[Dialogues], Dialogue]
    remember: Callable[[Dialogues, Dialogue, Reply], None]


class ReplyStream:
    """The events of one reply, for one reader on the event loop: text, audio and the end.

    The worker never waits for the reader. One who takes too little of a long reply loses it.
    """

    def __init__(self, worker: Worker, question: Question, meter: Meter) -> None:
        self._worker, self.question, self.meter = worker, question, meter
        self.ticket = Ticket(0)  # these four are the worker's
        self.dialogue = Dialogue()
        self.before = Mark()  # where the dialogue was
        self.complete = False
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._unread_samples = 0
        self._error: Exception | None = None
        self._forgotten = False  # nothing is told of it any more; the worker may not know yet
        self._ended = False  # nothing more will come

    def put(self, event: Event) -> None:
        """Take an event from the worker. On the loop."""
        if self._ended or (self._forgotten and not isinstance(event, Failed)):
            return
        if isinstance(event, Audio):
            self._unread_samples += event.samples.size
        if self._unread_samples > MAX_UNREAD_SAMPLES:
            self.fail(ApiError(500, "the reply was not read fast enough and was given up", "reader_too_slow"))
            self.close("reader too slow")
        elif isinstance(event, Failed):
            self.fail(event.error)
        else:
            self._events.append(event)
            self._ended = isinstance(event, Done)
            self._news.set()

    def fail(self, error: Exception) -> None:
        """Let the reader get an error in place of what it has not taken yet. On the loop."""
        self._events.clear()
        self._error, self._ended = error, True
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events to the last one, which is Done. Raises the error of a reply that failed."""
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Audio):
                    self._unread_samples -= event.samples.size
                yield event
                if isinstance(event, Done):
                    return
            if self._error:
                raise self._error
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()

    async def whole(self) -> Reply:
        """Return the reply when it is complete. Raises the error of one that failed."""
        async for event in self:
            if isinstance(event, Done):
                return event.reply
        raise AssertionError("a stream without its end was left by its only reader")

    async def interrupt(self, keep: bool) -> bool:
        """End the reply where it is. Return whether its dialogue remembers the round.

        keep: whether it may; it does then if the reply has begun. If it may not, the reader gets nothing any more, also
        of what the step under way brings: the dialogue will not know of it.
        """
        if not keep:
            self._forgotten = True
            self._events.clear()
        kept = await self._worker.call(lambda: self._worker.interrupt(self, keep))
        self._events.clear()
        self._ended = True
        self._news.set()
        return kept

    def close(self, reason: str = "cancelled") -> None:
        """Want no more. A reply under way is cancelled; a dialogue that nobody holds is forgotten.

        reason: what a reply under way is counted as.
        """
        self._ended = True
        self._worker.post(lambda: self._worker.leave(self, reason))


class Worker:
    """Owner of the engine and of the dialogues. Made, started and stopped on the event loop's thread."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.dialogues = Dialogues(engine, settings.parked_bytes, settings.keep_s)
        self.state = STARTING
        self.fault: Exception | None = None  # why it failed
        self._places, self._taken = settings.places, 0
        self._usual_s = 1.0  # how long a reply takes, on average of the last ones
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[Ticket, ReplyStream] = {}
        self._waiting: set[Ticket] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = self._over = False  # over: the thread takes nothing from the queue any more
        self._thread = threading.Thread(target=self._run, name="engine")
        metrics.watch(
            {
                "num_requests_running": ("Questions worked on", lambda: len(self._streams) - len(self._waiting)),
                "num_requests_waiting": ("Questions that wait for a slot", lambda: len(self._waiting)),
                "places_taken": ("Requests taken in, of slots and queue together", lambda: self.busy),
                "slots": ("Dialogues answered side by side at most", lambda: engine.num_slots),
                "parked_dialogues": ("Dialogues held between questions", lambda: len(self.dialogues)),
                "parked_bytes": ("Memory that they take when parked", lambda: self.dialogues.bytes),
            }
        )

    # --- on the event loop

    def start(self, on_started: Callable[[], None] = lambda: None) -> None:
        """Begin: one reply to nobody, then questions.

        on_started is called between, or when it has failed there, in the worker's thread; it must not raise.
        """
        self._on_started = on_started
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step under way. Questions under way end with an error."""
        self._stopping = True
        self.post(lambda: None)
        if self._thread.ident:  # it was started
            self._thread.join()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places of the server for a request. Raises ApiError if none is free, or it is not ready."""
        if self.state != READY:
            raise self.not_ready()
        if self._taken >= self._places:
            self.metrics.fail.labels("no place").inc()
            wait_s = min(60, math.ceil(self._usual_s * self._taken / self.engine.num_slots))
            message = f"all {self._places} places are taken; try again in about {wait_s} s"
            raise ApiError(429, message, "server_overloaded", headers={"retry-after": str(wait_s)})
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    def not_ready(self) -> ApiError:
        """Return the error of a request that comes too early, or too late."""
        if self.state == FAILED:
            return ApiError(503, "the server has failed and answers no more questions; its log says why", "failed")
        message = "the server is starting" if self.state == STARTING else "the server is ending"
        return ApiError(503, message, self.state, headers={"retry-after": "5"})

    @property
    def busy(self) -> int:
        """How many places are taken."""
        return self._taken

    @property
    def full(self) -> bool:
        """Whether no place is left."""
        return self._taken >= self._places

    @contextlib.asynccontextmanager
    async def reply(self, question: Question) -> AsyncIterator[ReplyStream]:
        """Give the events of the reply to a question; who leaves early cancels it. Raises what Engine.submit raises."""
        self._loop = asyncio.get_running_loop()
        stream = ReplyStream(self, question, Meter(self.metrics, question.ask.blocks is not None))
        try:
            await self.call(lambda: self._begin(stream))
            yield stream
        finally:
            stream.close()

    def lose(self, error: Exception) -> None:
        """Take no more questions: what they need is gone, be it a rank, whose step may never end. Any thread."""
        self.state, self.fault = FAILED, error
        self.post(lambda: self._fail(error))

    def call(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Return what a function gives that runs in the worker's thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if self.state == FAILED or self._over:
                        raise self.not_ready()
                    future.set_result(work())
                except Exception as error:  # noqa: BLE001 - carried to who called
                    future.set_exception(error)

        self.post(run)
        return asyncio.wrap_future(future)

    def post(self, work: Callable[[], None]) -> None:
        """Let a function run in the worker's thread between two steps; when that is over, now. From any thread."""
        self._commands.put(work)
        if self._over:
            self._do_commands(wait=False)

    # --- in the worker's thread

    def interrupt(self, stream: ReplyStream, keep: bool) -> bool:
        """End the reply of a stream where it is; see ReplyStream.interrupt."""
        self._forget_stream(stream, "interrupted")
        if keep:
            kept = self.engine.interrupt(stream.ticket) or stream.complete
            if kept and stream.dialogue in self.dialogues:
                self.dialogues.hold(stream.dialogue)
            return kept
        self.engine.cancel(stream.ticket)
        if stream.complete:  # told to nobody yet
            self.engine.rewind(stream.dialogue, stream.before)
        return False

    def leave(self, stream: ReplyStream, reason: str) -> None:
        """End what is under way for a stream; see ReplyStream.close."""
        self._forget_stream(stream, reason)
        self.engine.cancel(stream.ticket)
        if stream.dialogue not in self.dialogues:
            self.dialogues.forget(stream.dialogue)

    def _begin(self, stream: ReplyStream) -> None:
        question = stream.question
        stream.dialogue = question.dialogue(self.dialogues)
        stream.before = stream.dialogue.mark
        stream.ticket = self.engine.submit(stream.dialogue, question.waveform, question.ask)
        self._streams[stream.ticket] = stream
        self._waiting.add(stream.ticket)

    def _forget_stream(self, stream: ReplyStream, reason: str | None = None) -> None:
        """Tell a stream nothing more. reason: why its reply is not whole, counted if it was under way."""
        if self._streams.pop(stream.ticket, None) and reason:
            self.metrics.fail.labels(reason).inc()
        self._waiting.discard(stream.ticket)

    def _run(self) -> None:
        try:
            self._warm_up()
            if self.state == STARTING:
                self.state = READY
        except Exception as error:  # noqa: BLE001 - carried to who started the thread
            self._fail(error)
        self._on_started()
        try:
            while not self._stopping and self.state != FAILED:
                self._do_commands(wait=not self._streams)
                if self._streams:
                    self._tell(self.engine.step())
        except RankError as error:  # whoever has called lose() ends the process, which tells of it
            self._fail(error)
        except Exception as error:
            log.exception("the engine failed: no more questions are answered")
            self._fail(error)
        while not self._stopping:
            self._do_commands(wait=True)
        self._end_streams(ApiError(503, "the server is ending", DRAINING))
        self._over = True  # before the last look into the queue: who puts something there later sees it
        self._do_commands(wait=False)

    def _do_commands(self, wait: bool) -> None:
        """Do what is asked for; wait: for the first of it, looking after old dialogues now and then."""
        with contextlib.suppress(queue.Empty):
            if wait:
                _do(self._commands.get(timeout=IDLE_S))
            while True:
                _do(self._commands.get_nowait())
        if wait and self.state == READY:
            self.dialogues.trim()

    def _tell(self, events: Sequence[Event]) -> None:
        """Hand over what happened, to whom it concerns."""
        if self._waiting:
            for ticket in self._waiting.difference(self.engine.waiting):
                self._waiting.discard(ticket)
                self._streams[ticket].meter.began()
        told = []
        for event in events:
            stream = self._streams.get(event.ticket)
            if stream is None or not isinstance(event, Text | Audio | Done | Failed):
                continue
            stream.meter.see(event)
            if isinstance(event, Done):
                stream.complete = True
                stream.question.remember(self.dialogues, stream.dialogue, event.reply)
                self._usual_s += 0.1 * (stream.meter.age_s - self._usual_s)
            if isinstance(event, Done | Failed):
                self._forget_stream(stream, "failed" if isinstance(event, Failed) else None)
            told.append((stream, event))
        if told:
            self._on_loop(lambda: _put(told))
        for _, event in told:
            if isinstance(event, Failed):
                self._examine(event.error)

    def _examine(self, error: Exception) -> None:
        """Look whether a reply failed because the device did. Raises what the device raises then."""
        if not isinstance(error, CovoError):
            torch.ones(1, device=self.engine.model.device).add(1).item()

    def _fail(self, error: Exception) -> None:
        self.state, self.fault = FAILED, error
        self._end_streams(self.not_ready())

    def _end_streams(self, error: ApiError) -> None:
        streams, self._streams = list(self._streams.values()), {}
        self._waiting.clear()
        self.metrics.fail.labels("failed").inc(len(streams))
        self._on_loop(lambda: _fail(streams, error))

    def _on_loop(self, work: Callable[[], object]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to hear it
                self._loop.call_soon_threadsafe(work)

    def _warm_up(self) -> None:
        """Answer nobody, so that the first question finds everything at hand; verifies all weights.

        Where steps are captured, with all slots at a time: there is a graph for every number of them.
        """
        engine, model = self.engine, self.engine.model
        mode: Mode = "a2ta" if model.can_speak else "a2t"
        murmur = np.random.default_rng(0).normal(0, 0.01, audio.SAMPLE_RATE).astype(np.float32)
        waveform = audio.prepare(torch.from_numpy(murmur), audio.SAMPLE_RATE)
        ask, dialogues = Ask(mode, max_new_tokens=WARM_UP_TOKENS), []
        for _ in range(engine.num_slots if model.capture else 1):
            dialogues.append(Dialogue())
            engine.submit(dialogues[-1], waveform, ask)
        while any(dialogue.ticket for dialogue in dialogues) and not self._stopping:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise event.error
        for dialogue in dialogues:
            engine.forget(dialogue)
        if ask.speaks:  # whether the reply had codes or not
            model.token2wav([0] * WARM_UP_CODES)
            if model.speech_capture:
                model.token2wav([0] * WARM_UP_BLOCKS, blocks=SpeechBlocks())


def _do(command: Callable[[], None]) -> None:
    """Do what is asked for, unless it needs ranks that are gone: lose() has been called then, or is about to be."""
    with contextlib.suppress(RankError):
        command()


def _put(told: Sequence[tuple[ReplyStream, Event]]) -> None:
    for stream, event in told:
        stream.put(event)


def _fail(streams: Sequence[ReplyStream], error: ApiError) -> None:
    for stream in streams:
        stream.fail(error)
