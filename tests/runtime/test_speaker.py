"""The speaker: whose piece of work is next, what it tells, and that its thread comes and goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import Ask, CovoAudio
from covo_npu.runtime import speaker as speaker_module
from covo_npu.runtime.events import Audio, Event, Failed, Progress, Ticket
from covo_npu.runtime.options import SpeechBlocks
from covo_npu.runtime.speaker import Speaker, Spoken
from covo_npu.runtime.token2wav import Token2Wav

BLOCKS = SpeechBlocks((10,), look_ahead=2)
FIRST, SECOND, THIRD = (Ticket(number) for number in (1, 2, 3))


@pytest.fixture(scope="module")
def model(convert_tiny: Callable[[str], Path], device: str) -> CovoAudio:
    return CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32")


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """How many evaluations may still begin: none at first."""
    solve, turns = Token2Wav.solve, threading.Semaphore(0)

    def held(self: Token2Wav, *args: object) -> Iterator[Tensor]:
        assert turns.acquire(timeout=60)
        for latents in solve(self, *args):  # type: ignore[arg-type]
            yield latents
            assert turns.acquire(timeout=60)

    monkeypatch.setattr(Token2Wav, "solve", held)
    yield turns
    turns.release(10_000)


def told(speaker: Speaker, until: Callable[[Event], bool]) -> list[Event]:
    """Return the events up to the first for which `until` holds."""
    found: list[Event] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for event in speaker.events(wait=True):
            found.append(event)
            if until(event):
                return found
    raise AssertionError(f"not told; only {found}")


def over(*tickets: Ticket) -> Callable[[Event], bool]:
    left = set(tickets)

    def until(event: Event) -> bool:
        if isinstance(event, Spoken | Failed):
            left.discard(event.ticket)
        return not left

    return until


def evaluated(events: list[Event]) -> list[Ticket]:
    """Return whose evaluations there were, in order, a run of one as one."""
    tickets = [event.ticket for event in events if isinstance(event, Progress) and event.stage == "flow matching"]
    return [ticket for ticket, before in zip(tickets, [None, *tickets]) if ticket != before]


def test_replies_in_blocks_side_by_side_are_what_each_is_alone(model: CovoAudio) -> None:
    speaker, asks = Speaker(model), {FIRST: Ask(blocks=BLOCKS), SECOND: Ask(), THIRD: Ask(blocks=BLOCKS)}
    codes = {ticket: [(5 * i + ticket.number) % 40 for i in range(33)] for ticket in asks}
    for ticket, ask in asks.items():
        speaker.begin(ticket, ask, seed=ticket.number)
    for start in range(0, 33, 3):
        for ticket in asks:
            speaker.push(ticket, codes[ticket][start : start + 3])
    for ticket in asks:
        speaker.end(ticket)
    events = told(speaker, over(*asks))
    for ticket, ask in asks.items():
        expected = model.token2wav(codes[ticket], seed=ticket.number, blocks=ask.blocks or speaker_module.WHOLE)
        pieces = [event.samples for event in events if isinstance(event, Audio) and event.ticket == ticket]
        assert np.array_equal(np.concatenate(pieces), expected)
        assert [type(event) for event in events if event.ticket == ticket][-1] is Spoken
    assert not list(speaker.events(wait=False)) and not speaker._speeches


def test_the_listener_who_runs_dry_first_is_served_first(model: CovoAudio, turns: threading.Semaphore) -> None:
    """One has heard 0.3 s, one nothing, and a third wants a long reply whole: the second, the first, the third."""
    speaker = Speaker(model)
    speaker.begin(FIRST, Ask(blocks=BLOCKS), 0)
    speaker.push(FIRST, [1] * 11)
    turns.release(19)  # of its first block, and the look at what follows
    told(speaker, lambda event: isinstance(event, Audio))
    speaker.begin(THIRD, Ask(), 0)
    speaker.push(THIRD, [3] * 50)
    speaker.end(THIRD)  # due in 2 s
    speaker.push(FIRST, [1] * 10)
    speaker.begin(SECOND, Ask(blocks=BLOCKS), 0)
    speaker.push(SECOND, [2] * 10)
    speaker.end(FIRST)
    speaker.end(SECOND)
    turns.release(10_000)
    order = evaluated(told(speaker, over(FIRST, SECOND, THIRD)))
    order = order[1:] if order[0] == THIRD else order  # its first evaluation may have begun before the others came
    assert order[:1] == [SECOND] and order.index(FIRST) < len(order) - 1 - order[::-1].index(THIRD)


def test_a_cancelled_reply_says_no_more(model: CovoAudio, turns: threading.Semaphore) -> None:
    speaker = Speaker(model)
    for ticket in (FIRST, SECOND):
        speaker.begin(ticket, Ask(blocks=BLOCKS), 0)
        speaker.push(ticket, [1] * 30)
        speaker.end(ticket)
    turns.release(3)
    told(speaker, lambda event: isinstance(event, Progress))
    speaker.cancel(FIRST)
    speaker.cancel(FIRST)
    speaker.push(FIRST, [1])
    speaker.end(FIRST)
    turns.release(10_000)
    events = told(speaker, over(SECOND))
    assert not any(isinstance(event, Spoken | Audio) and event.ticket == FIRST for event in events)


def test_a_fault_is_told_after_what_was_spoken(model: CovoAudio) -> None:
    speaker = Speaker(model)
    speaker.begin(FIRST, Ask(blocks=BLOCKS), 0)
    speaker.push(FIRST, [1] * 10)
    [*_, audio] = told(speaker, lambda event: isinstance(event, Audio))
    speaker.push(FIRST, [99_999])
    events = told(speaker, over(FIRST))
    assert isinstance(audio, Audio) and audio.samples.size
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, CovoError)
    assert not speaker._speeches


def test_a_reply_without_codes_is_spoken(model: CovoAudio) -> None:
    speaker = Speaker(model)
    for ticket, ask in ((FIRST, Ask()), (SECOND, Ask(blocks=BLOCKS))):
        speaker.begin(ticket, ask, 0)
        speaker.end(ticket)
    assert [type(event) for event in told(speaker, over(FIRST, SECOND))] == [Spoken, Spoken]


def test_the_thread_ends_with_the_replies_and_without_codes(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a program that forgets an engine ends."""
    monkeypatch.setattr(speaker_module, "IDLE_S", 0.05)
    speaker = Speaker(model)
    speaker.begin(FIRST, Ask(blocks=BLOCKS), 0)
    assert speaker._thread is None
    for _ in range(2):
        speaker.push(FIRST, [1] * 10)
        if thread := speaker._thread:
            thread.join(60)
        assert speaker._thread is None and FIRST in speaker._speeches
    speaker.end(FIRST)
    events = told(speaker, over(FIRST))
    samples = np.concatenate([event.samples for event in events if isinstance(event, Audio)])
    assert np.array_equal(samples, model.token2wav([1] * 20, blocks=BLOCKS))
    if thread := speaker._thread:
        thread.join(60)
    assert speaker._thread is None
