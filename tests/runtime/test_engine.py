"""Continuous batching: every dialogue is answered as if it were alone, whatever runs beside it, and exactly once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime.tape import Tape
from torch import Tensor

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import Ask, CovoAudio, Dialogue, Engine, Sampling, Session
from covo_npu.runtime import engine as engine_module
from covo_npu.runtime.cli.batch import Answer, Item, answers
from covo_npu.runtime.decode import Decoder
from covo_npu.runtime.events import Audio, Codes, Done, Failed, Progress, Reply, Text, Ticket
from covo_npu.runtime.options import WHOLE, SpeechBlocks
from covo_npu.runtime.speech import SpeechStream
from covo_npu.runtime.token2wav import Token2Wav

AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH, CHINESE, LONG = (
    AUDIO / f"{name}.wav" for name in ("question_en_48k_24bit", "question_zh_44k_stereo", "long_16k_over30s")
)
DIALOGUES = (
    Item("one", (ENGLISH,)),
    Item("two", (CHINESE, ENGLISH)),
    Item("three", (LONG,)),
    Item("four", (ENGLISH, CHINESE, CHINESE)),
    Item("five", (CHINESE,)),
)
GREEDY, WARM = Sampling(), Sampling(temperature=0.9, top_k=50, top_p=0.95)


@pytest.fixture(scope="module")
def model(convert_tiny: Callable[[str], Path], device: str) -> CovoAudio:
    return CovoAudio.load(convert_tiny("float32"), device=device, dtype="float32", max_context=2600)


@pytest.fixture(scope="module", autouse=True)
def heard_once(model: CovoAudio) -> None:
    """Equal waveforms are encoded once. Encoders have tests of their own; here they would be most of the work."""
    encode, heard = model.encode, {}

    def remembered(waveform: Tensor) -> Tensor:
        key = waveform.numpy().tobytes()
        if key not in heard:
            heard[key] = encode(waveform)
        return heard[key].clone()

    model.encode = remembered  # type: ignore[method-assign]


Told = Callable[..., list[Reply]]


@pytest.fixture(scope="module")
def told(model: CovoAudio) -> Told:
    """A function: an Ask, questions -> the replies of a session that has the model to itself. Asked once."""

    @cache
    def replies(ask: Ask, *questions: Path) -> list[Reply]:
        chat = Session(model, ask)
        return [chat.say(question) for question in questions]

    return replies


@pytest.fixture(scope="module")
def alone(told: Told) -> dict[Sampling, dict[str, list[list[int]]]]:
    """The ids of every round, one dialogue at a time, through a session."""
    return {
        sampling: {
            dialogue.id: [r.tokens for r in told(Ask("a2t", sampling, 24, seed=4), *dialogue.questions)]
            for dialogue in DIALOGUES
        }
        for sampling in (GREEDY, WARM)
    }


def tokens(found: Iterator[Answer]) -> dict[str, list[list[int]]]:
    return {answer.item.id: [reply.tokens for reply in answer.replies] for answer in found}


@pytest.mark.parametrize(
    ("max_batch", "sampling", "form"),
    [
        (1, GREEDY, "eager"), (2, WARM, "ahead"), (3, GREEDY, "eager"), (3, WARM, "captured"), (3, GREEDY, "ahead"),
        (8, GREEDY, "captured"), (8, WARM, "eager"), (8, GREEDY, "ahead"),
    ],
    ids=lambda value: f"T={value.temperature}" if isinstance(value, Sampling) else None,
)  # fmt: skip
def test_a_batch_equals_one_at_a_time(
    model: CovoAudio, alone, monkeypatch: pytest.MonkeyPatch, max_batch: int, sampling: Sampling, form: str
) -> None:
    monkeypatch.setattr(model, "capture", Tape() if form == "captured" else None)
    engine, ask = Engine(model, max_batch), Ask("a2t", sampling, 24, seed=4)
    engine._decoder.runs_ahead = engine._decoder.runs_ahead or form == "ahead"
    assert tokens(answers(engine, DIALOGUES, ask)) == alone[sampling]
    assert engine.load.step_tokens == sum(len(t) - 1 for rounds in alone[sampling].values() for t in rounds)
    if max_batch > 1:
        assert engine.load.step_tokens / engine.load.steps > 1.3


def test_replies_of_different_lengths_leave_and_join_at_any_time(
    model: CovoAudio, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop token is one that occurs early in some replies, so slots are left in the middle and are moved into."""
    whole = [t for rounds in alone[GREEDY].values() for t in rounds]
    stop = next(i for i in whole[1] if i not in whole[0])
    monkeypatch.setitem(model.tokenizer.special, "endoftext", stop)
    moved: list[tuple[int, int]] = []
    move = Decoder.move
    monkeypatch.setattr(Decoder, "move", lambda self, a, b: moved.append((a, b)) or move(self, a, b))
    expected = {}
    for dialogue in DIALOGUES:
        chat = Session(model, mode="a2t", max_new_tokens=24)
        expected[dialogue.id] = [chat.say(question).tokens for question in dialogue.questions]
    lengths = {len(t) for rounds in expected.values() for t in rounds}
    assert len(lengths) > 1
    assert tokens(answers(Engine(model, 3), DIALOGUES, Ask("a2t", max_new_tokens=24))) == expected
    assert moved and all(source > target for source, target in moved)


def test_a_fault_ends_its_own_dialogue_only(model: CovoAudio, alone, tmp_path: Path) -> None:
    faulty = Item("faulty", (ENGLISH, tmp_path / "none.wav", ENGLISH))
    found = {
        answer.item.id: answer
        for answer in answers(Engine(model, 2), (faulty, *DIALOGUES), Ask("a2t", max_new_tokens=24))
    }
    assert "none.wav" in str(found["faulty"].error)
    assert [reply.tokens for reply in found["faulty"].replies] == alone[GREEDY]["one"]
    assert {name: [r.tokens for r in answer.replies] for name, answer in found.items() if name != "faulty"} == alone[
        GREEDY
    ]
    assert all(answer.error is None for name, answer in found.items() if name != "faulty")


def test_dialogues_are_taken_when_a_slot_is_free(model: CovoAudio) -> None:
    taken: list[str] = []

    def watched() -> Iterator[Item]:
        for dialogue in DIALOGUES:
            taken.append(dialogue.id)
            yield dialogue

    found = answers(Engine(model, 2), watched(), Ask("a2t", max_new_tokens=3))
    assert next(found).item.id in ("one", "two")
    assert taken == ["one", "two"]
    assert {answer.item.id for answer in found} | {"one", "two"} == {d.id for d in DIALOGUES}


# --- tickets and events


def finished(engine: Engine, *tickets: Ticket) -> dict[Ticket, Reply]:
    """Step until the tickets are done; nothing of any other ticket may happen."""
    replies: dict[Ticket, Reply] = {}
    while len(replies) < len(tickets):
        for event in engine.step():
            assert event.ticket in tickets and event.ticket not in replies
            if isinstance(event, Done):
                replies[event.ticket] = event.reply
    return replies


@pytest.fixture(scope="module")
def english(model: CovoAudio) -> Tensor:
    return model.waveform(ENGLISH)


@pytest.fixture(scope="module")
def chinese(model: CovoAudio) -> Tensor:
    return model.waveform(CHINESE)


def test_events_are_the_reply_in_pieces(model: CovoAudio) -> None:
    chat = Session(model, max_new_tokens=40, blocks=WHOLE)
    *events, done = chat.stream(ENGLISH)
    assert isinstance(done, Done)
    reply = done.reply
    assert "".join(event.text for event in events if isinstance(event, Text)) == reply.text
    assert [code for event in events if isinstance(event, Codes) for code in event.codes] == reply.audio_codes
    samples = np.concatenate([event.samples for event in events if isinstance(event, Audio)])
    assert reply.audio_codes and np.array_equal(samples, reply.waveform) and reply.waveform.size
    kinds = [type(event) for event in events]
    assert kinds.index(Progress) > max(kinds.index(Text), kinds.index(Codes))
    assert len({event.ticket for event in events}) == 1


BLOCKS = SpeechBlocks((6, 4), look_ahead=1)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_speech_comes_while_the_reply_is_generated(
    model: CovoAudio, english: Tensor, told: Told, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens as without; samples are those of these blocks, and the first are told before the last code."""
    ask = Ask(sampling=sampling, max_new_tokens=120, seed=8)
    [whole] = told(ask, ENGLISH)
    work, spoken = SpeechStream.work, threading.Event()

    def watched(self: SpeechStream) -> Iterator[Tensor]:
        yield from work(self)
        spoken.set()

    with monkeypatch.context() as once:
        once.setattr(SpeechStream, "work", watched)
        engine, events = Engine(model), []
        ticket = engine.submit(Dialogue(), english, replace(ask, blocks=BLOCKS))
        while sum(len(event.codes) for event in events if isinstance(event, Codes)) < 6:
            events += engine.step()
        assert spoken.wait(60)
        while not any(isinstance(event, Done) for event in events):
            events += engine.step()
    *events, done = events
    assert done.reply.tokens == whole.tokens and len(whole.audio_codes) >= 8
    kinds = [type(event) for event in events]
    assert kinds.index(Audio) < len(kinds) - 1 - kinds[::-1].index(Codes)
    samples = np.concatenate([event.samples for event in events if isinstance(event, Audio)])
    assert np.array_equal(samples, done.reply.waveform) and {event.ticket for event in events} == {ticket}
    assert np.array_equal(samples, model.token2wav(whole.audio_codes, seed=8, blocks=BLOCKS))
    assert np.array_equal(whole.waveform, model.token2wav(whole.audio_codes, seed=8))
    assert samples.shape == whole.waveform.shape and not np.array_equal(samples, whole.waveform)
    early, late = done.reply.timing, whole.timing
    assert early.ttft_s < early.ttfa_s < early.ttft_s + early.decode_s
    assert late.ttfa_s > late.ttft_s + late.decode_s and late.token2wav_s > 0
    assert Session(model, ask, mode="a2t").say(ENGLISH).timing.ttfa_s == 0


def test_decoding_does_not_wait_for_speech(model: CovoAudio, english: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first block of one reply is held, all tokens of both replies come."""
    go_on = held_speech(monkeypatch)
    engine, asks = Engine(model, 2), [Ask(max_new_tokens=60, blocks=BLOCKS), Ask("a2t", max_new_tokens=60)]
    spoken, written = (engine.submit(Dialogue(), english, ask) for ask in asks)
    events = []
    while not engine.speaking or not any(isinstance(event, Done) for event in events):
        events += engine.step()
    assert [event.ticket for event in events if isinstance(event, Done)] == [written]
    assert {event.ticket for event in events if isinstance(event, Codes | Text)} == {spoken, written}
    assert not any(isinstance(event, Audio) for event in events) and any(
        isinstance(event, Progress) for event in events
    )
    go_on.set()
    finished(engine, spoken)


def test_a_fault_of_speech_ends_a_reply_that_is_being_decoded(
    model: CovoAudio, english: Tensor, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ask = Engine(model, 2), Ask("a2t", max_new_tokens=60)
    expected = told(ask, ENGLISH)[0].tokens
    with monkeypatch.context() as once:
        once.setattr(CovoAudio, "speech_stream", raising(CovoError("no voice")))
        dialogue = Dialogue()
        broken = engine.submit(dialogue, english, Ask(max_new_tokens=2000, blocks=BLOCKS))
        written = engine.submit(Dialogue(), english, ask)
        events: list[Any] = []
        while not any(isinstance(event, Done) for event in events):
            events += engine.step()
    assert [(e.ticket, str(e.error)) for e in events if isinstance(e, Failed)] == [(broken, "no voice")]
    assert [(e.ticket, e.reply.tokens) for e in events if isinstance(e, Done)] == [(written, expected)]
    assert (dialogue.rounds, dialogue.length, dialogue.ticket) == (0, 0, None)
    again = finished(engine, engine.submit(dialogue, english, ask))
    assert [reply.tokens for reply in again.values()] == [expected]


@pytest.mark.parametrize("leave", [Engine.cancel, Engine.interrupt])
def test_who_leaves_while_others_are_decoded_gives_its_slot_to_the_last(
    model: CovoAudio, english: Tensor, told: Told, leave: Callable[[Engine, Ticket], object]
) -> None:
    """From outside of a step, with sampling whose tensors were made inside one."""
    engine, ask = Engine(model, 3), Ask("a2t", WARM, 60, seed=4)
    expected = told(ask, ENGLISH)[0].tokens
    first, *others = (engine.submit(Dialogue(), english, ask) for _ in range(3))
    events: list[Any] = []
    while len(engine._decoding) < 3:
        events += engine.step()
    assert not any(isinstance(event, Done) for event in events)
    leave(engine, first)
    found = finished(engine, *others)
    assert [reply.tokens for reply in found.values()] == [expected] * 2
    assert engine.free_slots == 3


def test_who_stops_listening_to_speech_leaves_nothing(model: CovoAudio, told: Told) -> None:
    ask = Ask(max_new_tokens=60, blocks=BLOCKS)
    chat, [expected] = Session(model, ask), told(ask, ENGLISH)
    for event in chat.stream(ENGLISH):
        if isinstance(event, Audio):
            break
    assert chat.engine.free_slots == 1 and not chat.engine.speaking and chat.dialogue.rounds == 0
    speaker = chat.engine._speaker
    if thread := speaker._thread:
        thread.join(60)
    assert not speaker._speeches and speaker._thread is None
    again = chat.say(ENGLISH)
    assert again.tokens == expected.tokens and np.array_equal(again.waveform, expected.waveform)


def test_questions_with_settings_of_their_own_run_side_by_side(model: CovoAudio, english: Tensor, told: Told) -> None:
    asks = [
        Ask("a2t", GREEDY, 20),
        Ask("a2t", WARM, 12, seed=3),
        Ask("a2ta", Sampling(0.7, 0, 0.5, window=3), 16, seed=5),
        Ask("a2t", Sampling(repetition_penalty=1.4), 9, system="Answer in one word."),
    ]
    expected = [told(ask, ENGLISH)[0] for ask in asks]
    engine = Engine(model, len(asks))
    tickets = [engine.submit(Dialogue(), english, ask) for ask in asks]
    replies = finished(engine, *tickets)
    for ticket, alone in zip(tickets, expected, strict=True):
        assert replies[ticket].tokens == alone.tokens
        assert np.array_equal(replies[ticket].waveform, alone.waveform)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_dialogues_between_two_questions_are_parked_and_go_on(
    model: CovoAudio, english: Tensor, chinese: Tensor, told: Told, num_slots: int
) -> None:
    """Four dialogues of two rounds in fewer slots: each second round finds the rows of the first."""
    ask, pairs = Ask("a2t", max_new_tokens=24), [(english, chinese), (chinese, english)]
    expected = [[reply.tokens for reply in told(ask, *paths)] for paths in ((ENGLISH, CHINESE), (CHINESE, ENGLISH))]
    engine, dialogues, found = Engine(model, num_slots), [Dialogue() for _ in range(4)], []
    for turn in (0, 1):
        tickets = [engine.submit(d, pairs[i % 2][turn], ask) for i, d in enumerate(dialogues)]
        replies = finished(engine, *tickets)
        found.append([replies[ticket].tokens for ticket in tickets])
    for i, dialogue in enumerate(dialogues):
        assert [turn[i] for turn in found] == expected[i % 2]
        assert dialogue.rounds == 2
    parked = [dialogue for dialogue in dialogues if dialogue.rows]
    assert len(parked) >= 4 - num_slots and all(dialogue.rows.bytes for dialogue in parked)
    for dialogue in dialogues:
        engine.forget(dialogue)
    assert not engine._residents and not any(dialogue.rows for dialogue in dialogues)


def held_speech(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let flow matching wait after each evaluation. Returns what it waits for."""
    solve, go_on = Token2Wav.solve, threading.Event()

    def held(self: Token2Wav, *args: Any) -> Iterator[Tensor]:
        for latents in solve(self, *args):
            yield latents
            assert go_on.wait(60)

    monkeypatch.setattr(Token2Wav, "solve", held)
    return go_on


STAGES = ("waiting", "heard", "filled", "decoded", "spoken")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_cancelled_question_leaves_no_trace(
    model: CovoAudio,
    english: Tensor,
    chinese: Tensor,
    told: Told,
    num_slots: int,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = Ask("a2t", max_new_tokens=12), Ask("a2ta", max_new_tokens=40)
    undisturbed = [reply.tokens for reply in told(first, ENGLISH, CHINESE)]
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 20)
    cancelled = held_speech(monkeypatch)
    engine, dialogue, other = Engine(model, num_slots), Dialogue(), Dialogue()
    [reply] = finished(engine, engine.submit(dialogue, english, first)).values()
    if stage == "waiting":
        for _ in range(num_slots):
            engine.submit(Dialogue(), english, Ask("a2t", max_new_tokens=300))
    ticket = engine.submit(dialogue, chinese, second)
    neighbour = None if stage == "waiting" else engine.submit(other, english, first)
    reached = {
        "waiting": lambda events: True,
        "heard": lambda events: engine._preparing and not engine._preparing.unheard,
        "filled": lambda events: engine._preparing and engine._preparing.filled > dialogue.length,
        "decoded": lambda events: any(isinstance(e, Codes | Text) and e.ticket == ticket for e in events),
        "spoken": lambda events: any(isinstance(e, Progress) for e in events),
    }[stage]
    before = []
    while not reached(events := engine.step()):
        before += events
    replies = {e.ticket: e.reply for e in before + events if isinstance(e, Done)}
    engine.cancel(ticket)
    engine.cancel(ticket)
    cancelled.set()
    assert (dialogue.rounds, dialogue.ticket) == (1, None)
    if neighbour and neighbour not in replies:
        replies |= finished(engine, neighbour)
    if neighbour:
        assert replies[neighbour].tokens == undisturbed[0]
    if stage != "waiting":
        again = finished(engine, engine.submit(dialogue, chinese, first))
        assert [reply.tokens for reply in again.values()] == undisturbed[1:]
        assert reply.tokens == undisturbed[0] and dialogue.rounds == 2
        assert engine.free_slots == num_slots and not engine.speaking


@pytest.mark.parametrize("stage", [*STAGES, "begun"])
def test_an_interrupted_reply_is_remembered_as_far_as_it_had_come(
    model: CovoAudio, english: Tensor, chinese: Tensor, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 20)
    engine, dialogue, ask = Engine(model, 2), Dialogue(), Ask("a2ta", WARM, 40, seed=1)
    if stage == "waiting":
        engine.submit(Dialogue(), english, Ask("a2t", max_new_tokens=300))
    ticket = engine.submit(dialogue, english, ask)
    told: list[Any] = []
    codes = lambda: sum(len(event.codes) for event in told if isinstance(event, Codes))  # noqa: E731
    reached = {
        "waiting": lambda: True,
        "heard": lambda: engine._preparing and not engine._preparing.unheard,
        "filled": lambda: engine._preparing and engine._preparing.filled > 20,
        "begun": lambda: bool(told),
        "decoded": lambda: codes() > 1,
        "spoken": lambda: any(isinstance(event, Progress) for event in told),
    }[stage]
    while not reached():
        told += [event for event in engine.step() if event.ticket == ticket]
        assert not any(isinstance(event, Done) for event in told)
    begun = stage in ("begun", "decoded", "spoken")
    assert engine.interrupt(ticket) == begun and not engine.interrupt(ticket)
    engine.cancel(ticket)  # who leaves afterwards does no harm
    assert (dialogue.rounds, dialogue.ticket, ticket in engine.waiting) == (int(begun), None, False)
    # Cut off after n ids is what a reply of n ids at most leaves behind.
    alone = Session(model, replace(ask, mode="a2t", max_new_tokens=len(dialogue.mark.reply) + 1))
    if begun:
        assert tuple(alone.say(ENGLISH).tokens[:-1]) == dialogue.mark.reply
        assert dialogue.mark == alone.dialogue.mark
    expected = alone.say(CHINESE).tokens
    second = engine.submit(dialogue, chinese, replace(ask, mode="a2t", max_new_tokens=len(expected)))
    told = []
    while not any(isinstance(event, Done) and event.ticket == second for event in told):
        told += engine.step()
    assert not any(event.ticket == ticket for event in told)
    assert [event.reply.tokens for event in told if isinstance(event, Done) and event.ticket == second] == [expected]
    assert stage == "waiting" or engine.free_slots == 2


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 2, 100])
def test_a_truncated_reply_is_one_that_ended_there(
    model: CovoAudio, english: Tensor, chinese: Tensor, kept: int, parked: bool
) -> None:
    ask = Ask("a2t", max_new_tokens=60)
    engine, dialogue = Engine(model, 1), Dialogue()
    [reply] = finished(engine, engine.submit(dialogue, english, ask)).values()
    if parked:
        finished(engine, engine.submit(Dialogue(), chinese, Ask("a2t", max_new_tokens=2)))
        assert dialogue.rows
    ids = reply.tokens[:-1]
    codes = [n for n, token in enumerate(ids, 1) if token >= model.config.audio_token_index]
    assert len(codes) > 3 and codes[0] > 1, "text first, codes between text"
    length = len(ids) if kept > len(codes) else codes[kept - 1] if kept else 0
    engine.truncate(dialogue, kept)
    assert dialogue.mark.reply == tuple(ids[:length])
    alone = Session(model, replace(ask, max_new_tokens=length + 1))
    alone.say(ENGLISH)
    assert alone.dialogue.mark == dialogue.mark
    alone.ask = ask
    [second] = finished(engine, engine.submit(dialogue, chinese, ask)).values()
    assert second.tokens == alone.say(CHINESE).tokens
    ticket = engine.submit(dialogue, chinese, ask)
    with pytest.raises(CovoError, match="a question under way"):
        engine.truncate(dialogue, 0)
    engine.cancel(ticket)


@pytest.mark.parametrize("place", ["slot", "parked", "preparing", "decoding"])
def test_a_fork_goes_on_from_an_earlier_round(
    model: CovoAudio, english: Tensor, chinese: Tensor, told: Told, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Ask("a2t", WARM, 12)
    first, second, third = (reply.tokens for reply in told(ask, ENGLISH, CHINESE, ENGLISH))
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 20)
    engine, dialogue = Engine(model, 2), Dialogue()
    finished(engine, engine.submit(dialogue, english, ask))
    mark = dialogue.mark
    assert (mark.rounds, mark.reply) == (1, tuple(first[:-1]))
    [reply] = finished(engine, engine.submit(dialogue, chinese, ask)).values()
    assert reply.tokens == second
    ticket = None
    if place == "parked":
        finished(engine, *(engine.submit(Dialogue(), english, ask) for _ in range(3)))
        assert dialogue.rows
    elif place != "slot":
        ticket = engine.submit(dialogue, english, ask)
        reached = {
            "preparing": lambda: engine._preparing and engine._preparing.filled > dialogue.length,
            "decoding": lambda: engine._decoding,
        }[place]
        while not reached():
            engine.step()
    fork = engine.fork(dialogue, mark)
    assert fork.rows is not None and fork.rows.bytes == mark.length * engine.row_bytes
    ticket = ticket or engine.submit(dialogue, english, ask)
    other = engine.submit(fork, chinese, ask)
    replies = finished(engine, ticket, other)
    assert (replies[other].tokens, replies[ticket].tokens) == (second, third)
    assert (fork.rounds, dialogue.rounds) == (2, 3)


class Counted:
    """Stands where a function does and keeps what it was called with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, []

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        return self.function(*args)


def test_a_first_id_is_told_before_the_step_that_follows_it(
    model: CovoAudio, english: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a step is over when it returns: who waits for the first word would wait for the second, too.

    Other devices are given the step before the id is read, so that they are never idle.
    """
    engine = Engine(model, 2)
    step = Counted(engine._decoder.step)
    monkeypatch.setattr(engine._decoder, "step", step)
    engine.submit(Dialogue(), english, Ask("a2t", max_new_tokens=10))
    while not (events := engine.step()):
        assert not step.calls
    assert len(step.calls) == engine._decoder.runs_ahead
    assert all(isinstance(event, Text | Codes) for event in events)
    [round_] = engine._decoding
    assert len(round_.tokens) == 1
    while not any(isinstance(event, Done) for event in engine.step()):
        pass
    assert len(step.calls) == 9


def test_no_piece_of_work_holds_the_others_for_longer_than_itself(
    model: CovoAudio, english: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one reply is spoken and a long question is heard and read, every step brings the third its next token."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 64)
    may_speak = held_speech(monkeypatch)
    engine = Engine(model, 3)
    spoken = engine.submit(Dialogue(), english, Ask("a2ta", max_new_tokens=40))
    while not engine.speaking:
        engine.step()
    talking = engine.submit(Dialogue(), english, Ask("a2t", max_new_tokens=200))
    while not engine._decoding:
        engine.step()
    engine.submit(Dialogue(), model.waveform(LONG), Ask("a2t", max_new_tokens=200))
    encode, fill = Counted(model.encode), Counted(engine._decoder.fill)
    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(engine._decoder, "fill", fill)
    step = Counted(engine._decoder.step)
    monkeypatch.setattr(engine._decoder, "step", step)
    for steps in range(1, 40):
        before = len(encode.calls) + len(fill.calls)
        engine.step()
        assert len(step.calls) == steps and len(encode.calls) + len(fill.calls) <= before + 1
        if len(engine._decoding) == 2:
            break
    assert len(encode.calls) >= 2 and all(len(waveform) <= 30 * 24_000 for [waveform] in encode.calls)
    assert len(fill.calls) > 3 and all(len(embeddings) <= 64 for _, embeddings, _ in fill.calls)
    assert engine.speaking == 1 and talking
    may_speak.set()
    while not any(isinstance(event, Done) and event.ticket == spoken for event in engine.step()):
        pass


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def test_a_fault_in_one_reply_is_its_own(
    model: CovoAudio, english: Tensor, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ask = Engine(model, 2), Ask("a2t", max_new_tokens=10)
    expected = told(ask, ENGLISH)[0].tokens
    broken = engine.submit(Dialogue(), english, ask)
    engine.submit(Dialogue(), english, ask)
    with monkeypatch.context() as once:
        once.setattr(engine._decoder, "fill", raising(RuntimeError("out of luck")))
        while not (events := engine.step()):
            pass
    [failed] = events
    assert isinstance(failed, Failed) and (failed.ticket, str(failed.error)) == (broken, "out of luck")
    while not any(isinstance(event, Done) for event in events):
        events += engine.step()
    assert [event.reply.tokens for event in events if isinstance(event, Done)] == [expected]
    monkeypatch.setattr(CovoAudio, "speech_stream", raising(CovoError("no voice")))
    with pytest.raises(CovoError, match="no voice"):
        Session(model, engine=engine, max_new_tokens=4).say(ENGLISH)
    assert engine.free_slots == 2 and not engine.speaking


def test_four_sessions_in_four_threads(model: CovoAudio, told: Told) -> None:
    asks = [Ask("a2ta", GREEDY, 20), Ask("a2t", WARM, 20, seed=2), Ask("a2ta", WARM, 15, seed=9), Ask("a2t", GREEDY, 9)]
    expected = [told(ask, ENGLISH)[0] for ask in asks]
    shared = Engine(model, 2)
    for engine in (None, shared):  # each in an engine of its own; all in one
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda ask: Session(model, ask, engine=engine).say(ENGLISH), asks))  # noqa: B023
        for reply, alone in zip(found, expected, strict=True):
            assert reply.tokens == alone.tokens and np.array_equal(reply.waveform, alone.waveform)


def test_who_stops_listening_cancels(model: CovoAudio, told: Told) -> None:
    ask = Ask("a2t", max_new_tokens=30)
    chat, expected = Session(model, ask), told(ask, ENGLISH)[0].tokens
    for event in chat.stream(ENGLISH):
        if isinstance(event, Codes | Text):
            break
    assert chat.engine.free_slots == 1 and chat.dialogue.ticket is None
    assert chat.say(ENGLISH).tokens == expected


def test_a_question_that_is_cancelled_from_elsewhere_ends_whoever_waits_for_it(model: CovoAudio, told: Told) -> None:
    ask = Ask("a2t", max_new_tokens=30)
    chat, expected = Session(model, ask), told(ask, ENGLISH)[0].tokens
    events = chat.stream(ENGLISH)
    next(events)
    assert chat.dialogue.ticket is not None
    chat.engine.cancel(chat.dialogue.ticket)
    assert list(events) == []

    def cancel(text: str) -> None:
        chat.engine.forget(chat.dialogue)

    with pytest.raises(CovoError, match="the question was cancelled"):
        chat.say(ENGLISH, on_text=cancel)
    assert chat.say(ENGLISH).tokens == expected


def test_a_step_that_fails_is_taken_again(
    convert_tiny: Callable[[str], Path], english: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory for a moment: whoever steps again goes on as if nothing had been, bit for bit."""
    model = CovoAudio.load(convert_tiny("float32"), device="cpu", dtype="float32", max_context=900)
    rows: list[Tensor] = []
    logits = model.networks.llm.logits

    def record(hidden: Tensor) -> Tensor:
        rows.append(logits(hidden))
        return rows[-1].clone()

    def steps(fails: bool) -> list[Tensor]:
        engine, ended = Engine(model), False
        engine.submit(Dialogue(), english, Ask("a2t", max_new_tokens=12))
        rows.clear()
        monkeypatch.setattr(model.networks.llm, "logits", record)
        while not ended:
            if fails and len(rows) == 5:
                monkeypatch.setattr(model.networks.llm, "logits", raising(RuntimeError("can't allocate memory")))
                with pytest.raises(RuntimeError, match="can't allocate"):
                    engine.step()
                monkeypatch.setattr(model.networks.llm, "logits", record)
                fails = False
            ended = any(isinstance(event, Done) for event in engine.step())
        return list(rows)

    found, expected = steps(True), steps(False)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_one_question_of_a_dialogue_at_a_time(model: CovoAudio, english: Tensor) -> None:
    engine, dialogue, ask = Engine(model, 2), Dialogue(), Ask("a2t", max_new_tokens=4)
    ticket = engine.submit(dialogue, english, ask)
    with pytest.raises(CovoError, match="a question under way"):
        engine.submit(dialogue, english, ask)
    finished(engine, ticket)
    finished(engine, engine.submit(dialogue, english, ask))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        ({"mode": "speech"}, "mode must be one of a2ta, a2t, found 'speech'"),
        ({"seed": 2**70, "max_new_tokens": -1}, "max_new_tokens must be .*; seed must be a 64-bit integer"),
    ],
)
def test_impossible_asks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ask(**fields)
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        Engine(None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["encode", "copy", "park"])
def test_what_fails_before_the_first_token_leaves_every_dialogue_its_rows(
    model: CovoAudio, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A device without memory left while it hears a question, or while rows change their place."""

    def replies(fails: bool) -> list[list[int]]:
        engine = Engine(model, 2 if fault == "copy" else 1)
        ask = Ask("a2t", max_new_tokens=6)
        first, second = Session(model, ask, engine=engine), Session(model, ask, engine=engine)
        first.say(ENGLISH)
        second.say(CHINESE)
        # The rows of the second one are in slot 0, those of the first one are parked.
        asked, other = (second, first) if fault == "copy" else (first, second)
        if fails:
            with monkeypatch.context() as once:
                once.setattr(model if fault == "encode" else engine._decoder, fault, lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    asked.say(CHINESE)
        return [asked.say(ENGLISH).tokens, other.say(ENGLISH).tokens]

    assert replies(fails=True) == replies(fails=False)
