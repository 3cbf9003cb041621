"""Realtime sessions through the official client: GA events in their order, turns, barge-in, and what is remembered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from openai.types.realtime import ClientSecretCreateResponse
from pydantic import TypeAdapter
from serve.harness import CHINESE, ENGLISH, MODEL, Running, b64, serving
from serve.talk import LAST, Talk, kinds, pcm, talking, transcript

from covo_npu.runtime import Ask, CovoAudio, Reply, Sampling, Session, audio, resampling
from covo_npu.runtime.engine import Dialogue, Engine, Mark
from covo_npu.runtime.events import Done, Event, Text
from covo_npu.runtime.options import SpeechBlocks
from covo_npu.serve.dialogues import Dialogues
from covo_npu.serve.errors import ApiError
from covo_npu.serve.realtime.hearing import Hearing
from covo_npu.serve.realtime.session import Format, TurnDetection
from covo_npu.serve.resample import g711
from covo_npu.serve.vad import SpeechStopped

RATE = 24_000
SPOKEN_TURN = [
    "response.created", "response.output_item.added", "conversation.item.added", "response.content_part.added",
    "response.output_audio_transcript.delta", "response.output_audio.delta", "response.output_audio.done",
    "response.output_audio_transcript.done", "response.content_part.done", "response.output_item.done",
    "conversation.item.done", "response.done", "rate_limits.updated",
]  # fmt: skip
COMMITTED = ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]


@pytest.fixture(scope="module")
def english(model: CovoAudio) -> bytes:
    return audio.to_pcm16(model.waveform(ENGLISH))


@pytest.fixture(scope="module")
def chinese(model: CovoAudio) -> bytes:
    return audio.to_pcm16(model.waveform(CHINESE))


def say(chat: Session, data: bytes) -> Reply:
    """What a session answers to the samples of a client."""
    *_, done = chat.stream(np.frombuffer(data, "<i2").astype(np.float32) / 32768, RATE)
    assert isinstance(done, Done)
    return done.reply


@pytest.fixture
def slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take a while, so that there is time to act between them."""
    engine = running.service.worker.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Speech is not begun while the event is clear."""
    may_speak, speak = threading.Event(), CovoAudio.speech_stream
    may_speak.set()  # a server warms up

    def held(self: CovoAudio, *args: Any, **kwargs: Any) -> Any:
        assert may_speak.wait(60)
        return speak(self, *args, **kwargs)

    monkeypatch.setattr(CovoAudio, "speech_stream", held)
    yield may_speak
    may_speak.set()


# --- turns


def test_turns_by_hand(model: CovoAudio, running: Running, english: bytes, chinese: bytes) -> None:
    """Two turns, every event in its place, the same text and samples as a session's."""
    chat, earlier = Session(model), []
    with talking(running) as talk:
        for data in (english, chinese):
            before, reply = chat.dialogue.length, say(chat, data)
            talk.say(data)
            talk.send("input_audio_buffer.commit")
            *_, question = committed = [talk.next(name) for name in COMMITTED]
            talk.send("response.create", event_id="mine", response={"metadata": {"turn": "x"}})
            events = talk.until(LAST)
            assert kinds(events) == SPOKEN_TURN
            assert transcript(events) == reply.text and pcm(events) == audio.to_pcm16(reply.waveform)
            item_id = question["item"]["id"]
            assert committed[0]["item_id"] == committed[1]["item"]["id"] == item_id
            assert [e["previous_item_id"] for e in committed] == [earlier[-1] if earlier else None] * 3
            of_item = [event for event in events if "item_id" in event]
            [reply_id] = {event["item_id"] for event in of_item}
            [response_id] = {event["response_id"] for event in events if "response_id" in event}
            assert {(e["output_index"], e["content_index"]) for e in of_item} == {(0, 0)}
            by_kind = {event["type"]: event for event in events}
            assert by_kind["conversation.item.added"]["previous_item_id"] == item_id
            assert by_kind["conversation.item.added"]["item"]["content"] == []
            assert by_kind["response.output_audio_transcript.done"]["transcript"] == reply.text
            assert by_kind["response.content_part.done"]["part"] == {"type": "audio", "transcript": reply.text}
            done = by_kind["response.done"]["response"]
            [output] = done["output"]
            assert output == by_kind["conversation.item.done"]["item"] == by_kind["response.output_item.done"]["item"]
            assert output["id"] == reply_id and output["status"] == "completed"
            assert output["content"] == [{"type": "output_audio", "transcript": reply.text}]
            assert by_kind["response.created"]["response"]["status"] == "in_progress"
            assert (done["id"], done["status"], done["metadata"]) == (response_id, "completed", {"turn": "x"})
            usage = done["usage"]
            assert usage["input_tokens"] == before + reply.prompt_tokens
            assert usage["output_tokens"] == len(reply.tokens)
            assert usage["input_token_details"]["cached_tokens"] == before
            assert usage["output_token_details"]["audio_tokens"] == len(reply.audio_codes)
            earlier += [item_id, reply_id]
    assert running.idle()


def test_written_turns(model: CovoAudio, running: Running, english: bytes, chinese: bytes) -> None:
    ask = Ask("a2t", Sampling(0.9, top_p=0.8), 40, seed=3)
    chat = Session(model, ask)
    with talking(running, output_modalities=["text"], temperature=0.9, top_p=0.8, seed=3, max_output_tokens=40) as talk:
        for data in (english, chinese):
            events = talk.ask(data)
            assert kinds(events)[4:6] == ["response.output_text.delta", "response.output_text.done"]
            reply = say(chat, data)
            assert transcript(events) == reply.text and not pcm(events)
            done = events[-2]["response"]
            assert done["output"][0]["content"] == [{"type": "output_text", "text": reply.text}]
            assert (done["status"], done["status_details"]) == {
                "stop": ("completed", None),
                "length": ("incomplete", {"type": "incomplete", "reason": "max_output_tokens"}),
            }[reply.stop_reason]


def test_a_response_may_differ_from_its_session(model: CovoAudio, running: Running, english: bytes) -> None:
    with talking(running) as talk:
        text = say(Session(model, mode="a2t", max_new_tokens=7), english).text
        events = talk.ask(english, output_modalities=["text"], max_output_tokens=7)
        assert transcript(events) == text and events[-2]["response"]["max_output_tokens"] == 7
        talk.send("session.update", session={"type": "realtime"})
        assert talk.next("session.updated")["session"]["output_modalities"] == ["audio"]


@pytest.mark.parametrize("piece", [960, 9_600, 10**6])
def test_turns_by_voice_activity(
    model: CovoAudio, running: Running, english: bytes, chinese: bytes, piece: int
) -> None:
    """What lies between the announced times is what is answered, however the audio was cut."""
    silence, chat = bytes(2 * RATE), Session(model, max_new_tokens=30)
    sent = b""
    with running.client().realtime.connect(model=MODEL) as connection:
        talk = Talk(connection)
        assert talk.session["audio"]["input"]["turn_detection"] == {
            "type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 500,
            "create_response": True, "interrupt_response": True, "idle_timeout_ms": None,
        }  # fmt: skip
        talk.update(type="realtime", max_output_tokens=30)
        for data in (silence + english + silence, silence + chinese + silence):
            talk.say(data, piece)
            sent += data
            events = talk.until(LAST)
            if events[0]["type"] == "input_audio_buffer.speech_started" and kinds(events).count(COMMITTED[0]) > 1:
                pytest.fail("the recording is one turn")
            assert kinds(events)[:2] == ["input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped"]
            assert kinds(events)[2:] == [*COMMITTED, *SPOKEN_TURN]
            started, stopped, committed = events[:3]
            assert started["item_id"] == stopped["item_id"] == committed["item_id"]
            begin, end = started["audio_start_ms"], stopped["audio_end_ms"]
            assert 1000 * (len(sent) - len(data)) / 2 / RATE <= begin < end <= 1000 * len(sent) / 2 / RATE
            heard = sent[begin * RATE // 1000 * 2 : end * RATE // 1000 * 2]
            assert transcript(events) == say(chat, heard).text
    assert running.idle()


@pytest.mark.parametrize(
    ("said", "rate", "encode"),
    [
        ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}, 16_000, "pcm"),
        ({"audio": {"input": {"format": {"type": "audio/pcmu"}}}}, 8_000, "ULAW"),
        ({"audio": {"input": {"format": {"type": "audio/pcma"}}}}, 8_000, "ALAW"),
        ({"input_audio_format": "g711_alaw"}, 8_000, "ALAW"),
        ({"input_audio_format": "pcm16"}, RATE, "pcm"),
    ],
)
def test_other_encodings_of_what_is_said(
    model: CovoAudio, running: Running, said: dict[str, Any], rate: int, encode: str
) -> None:
    """The same samples as a file of that rate would give; and turns are noticed in them."""
    import io

    samples, found = soundfile.read(ENGLISH, dtype="float32")
    step = found // rate
    coarse = samples[::step] if step > 1 else resampling.resample(model.waveform(ENGLISH), RATE, rate, np.float32)
    coarse = (np.asarray(coarse) * 32767).astype("<i2")
    if encode == "pcm":
        data, decoded = coarse.tobytes(), coarse.astype(np.float32) / 32768
    else:
        file = io.BytesIO()
        soundfile.write(file, coarse, rate, format="RAW", subtype=encode)
        data = file.getvalue()
        decoded = g711(data, {"ULAW": "pcmu", "ALAW": "pcma"}[encode])
    chat = Session(model, max_new_tokens=20)
    width = len(data) // coarse.size
    with talking(running, max_output_tokens=20) as talk:
        talk.update(type="realtime", **said)
        events = talk.ask(data)
        assert transcript(events) == chat.say(decoded, rate).text
        talk.update(type="realtime", turn_detection={"type": "server_vad"})
        talk.say(data + (bytes(rate) * width if width == 2 else b"\xd5" * rate))
        events = talk.until(LAST)
        assert kinds(events)[0] == "input_audio_buffer.speech_started"
        second_ms = 1000 * coarse.size / rate
        assert second_ms <= events[0]["audio_start_ms"] < events[1]["audio_end_ms"] <= 2 * second_ms + 1000


# --- interruption and memory


def silent_after(model: CovoAudio, data: bytes, ids: int, **fields: Any) -> Session:
    """A session whose first reply had so many ids in the cache, and no more."""
    chat = Session(model, max_new_tokens=ids + 1, **fields)
    say(chat, data)
    assert len(chat.dialogue.mark.reply) == ids
    chat.ask = replace(chat.ask, max_new_tokens=80)
    return chat


def ids_of_first_codes(model: CovoAudio, data: bytes, codes: int) -> int:
    """How many ids a reply has up to its n-th code."""
    tokens = say(Session(model), data).tokens[:-1]
    ends = [n for n, token in enumerate(tokens, 1) if token >= model.config.audio_token_index]
    assert len(ends) > codes
    return ends[codes - 1] if codes else 0


def dialogue(running: Running) -> Any:
    [session] = running.service.sessions
    return session._conversation.dialogue


@pytest.mark.parametrize("codes", [0, 2, 3])
def test_the_model_remembers_what_was_heard(
    model: CovoAudio, running: Running, english: bytes, chinese: bytes, codes: int
) -> None:
    """The client says how much of the reply was played; the next answer is that of a dialogue that ended there."""
    with talking(running, max_output_tokens=80) as talk:
        events = talk.ask(english)
        reply_id = events[-2]["response"]["output"][0]["id"]
        talk.send("conversation.item.truncate", item_id=reply_id, content_index=0, audio_end_ms=40 * codes + 39)
        assert talk.next("conversation.item.truncated")["audio_end_ms"] == 40 * codes + 39
        talk.send("conversation.item.retrieve", item_id=reply_id)
        [content] = talk.next("conversation.item.retrieved")["item"]["content"]
        assert content["transcript"] is None
        ids = ids_of_first_codes(model, english, codes)
        assert len(dialogue(running).mark.reply) == ids
        expected, events = silent_after(model, english, ids), talk.ask(chinese)
        heard = audio.num_placeholders(len(english) // 2) + audio.num_placeholders(len(chinese) // 2) + codes
        assert transcript(events) == say(expected, chinese).text
        assert events[-2]["response"]["usage"]["input_token_details"]["audio_tokens"] == heard


def test_speech_ends_a_response(model: CovoAudio, running: Running, english: bytes, slow: None) -> None:
    """Barge-in while tokens come: the reply ends where it is, and the turn is answered."""
    with talking(running, turn_detection={"type": "server_vad"}, max_output_tokens=100) as talk:
        talk.say(english + bytes(2 * RATE))
        before = talk.until("response.output_audio_transcript.delta")
        talk.say(english[: 3 * RATE])
        events = talk.until("response.done")
        interrupted = events[-1]["response"]
        assert "input_audio_buffer.speech_started" in kinds(events)
        assert (interrupted["status"], interrupted["status_details"]["reason"]) == ("cancelled", "turn_detected")
        tail = kinds(events)[kinds(events).index("response.output_audio.done") :]
        assert tail == SPOKEN_TURN[6:-1]
        [item] = interrupted["output"]
        assert item["status"] == "incomplete"
        assert item["content"][0]["transcript"] == transcript(before + events)
        mark = dialogue(running).mark
        assert mark.rounds == 1 and interrupted["usage"]["output_tokens"] == len(mark.reply)
        talk.next(LAST)
        talk.say(english[3 * RATE :] + bytes(2 * RATE))
        assert talk.until("response.done")[-1]["response"]["status"] != "cancelled"
    assert running.idle()


@pytest.mark.parametrize("spoken", [False, True])
def test_a_cancelled_response_is_remembered_as_far_as_it_was_told(
    model: CovoAudio, running: Running, english: bytes, chinese: bytes, slow: None, mute: threading.Event, spoken: bool
) -> None:
    whole = len(say(Session(model, max_new_tokens=80), english).tokens) - 1
    with talking(running, max_output_tokens=80) as talk:
        mute.clear()
        talk.say(english)
        talk.commit()
        talk.send("response.create")
        for _ in range(2):  # of what was told the last id is not remembered
            talk.until("response.output_audio_transcript.delta")
        if spoken:  # all ids are there, and no sound yet
            while not running.service.worker.engine.speaking:
                time.sleep(0.01)
        talk.send("response.cancel")
        done = talk.until("response.done")[-1]["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
        ids = len(dialogue(running).mark.reply)
        assert ids and (ids == whole) == spoken
        mute.set()
        talk.next(LAST)
        assert transcript(talk.ask(chinese)) == say(silent_after(model, english, ids), chinese).text
    assert running.idle()


def test_what_was_never_spoken_of_a_cancelled_response_is_forgotten(
    model: CovoAudio, english: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that was sent was played; codes that waited for their block were not."""
    cut = SpeechBlocks(sizes=(7, 1000), look_ahead=3)
    with serving(model, blocks=cut) as running, talking(running, max_output_tokens=80) as talk:
        engine = running.service.worker.engine
        decode = engine._decode

        def held() -> None:
            """Stand still after seven codes, until the reply is cancelled."""
            if not engine._decoding or len(engine._codes(engine._decoding[0].tokens)) < 7:
                decode()
            else:
                time.sleep(0.01)

        monkeypatch.setattr(engine, "_decode", held)
        talk.say(english)
        talk.commit()
        talk.send("response.create")
        events = talk.until("response.output_audio.delta")
        talk.send("response.cancel")
        events += talk.until("response.done")
        sent_ms, item_id = len(pcm(events)) // (2 * RATE // 1000), events[-1]["response"]["output"][0]["id"]

        def codes() -> int:
            return sum(token >= model.config.audio_token_index for token in dialogue(running).mark.reply)

        assert codes() == 6 and 0 < sent_ms < 4 * 40  # the cache lacks the last; three are held back by their block
        talk.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=sent_ms)
        talk.until("conversation.item.truncated")
        assert codes() == sent_ms // 40


def test_a_question_without_any_answer_is_asked_again_with_the_next(
    model: CovoAudio, running: Running, english: bytes, chinese: bytes, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user goes on after a pause that was taken for the end: both parts are one question."""
    with talking(running) as talk:
        talk.say(english)
        talk.commit()
        talk.send("response.create")
        talk.next("response.created")
        talk.send("response.cancel")
        events = talk.until(LAST)
        assert kinds(events) == ["response.done", LAST] and events[0]["response"]["output"] == []
        assert events[0]["response"]["status"] == "cancelled" and events[0]["response"]["usage"] is None
        assert dialogue(running).rounds == 0
        assert transcript(talk.ask(chinese)) == say(Session(model), english + chinese).text


@pytest.mark.parametrize("limit", [80, 1], ids=["goes on", "is complete"])
def test_what_the_step_under_way_brings_of_a_cancelled_response_is_neither_told_nor_remembered(
    model: CovoAudio, running: Running, english: bytes, chinese: bytes, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The client cancels before it has had anything of the reply, in the step that brings the first of it."""
    worker, answered = running.service.worker, threading.Event()
    step = worker.engine.step

    def held() -> list[Event]:
        events = step()
        if any(isinstance(event, Text) for event in events):
            answered.set()
            while worker._commands.empty():
                time.sleep(0.001)
        return events

    with talking(running, output_modalities=["text"], max_output_tokens=limit) as talk:
        talk.say(english)
        talk.commit()
        with monkeypatch.context() as once:
            once.setattr(worker.engine, "step", held)
            talk.send("response.create")
            assert answered.wait(30)
            talk.send("response.cancel")
            events = talk.until(LAST)
        assert kinds(events) == ["response.created", "response.done", LAST]
        done = events[1]["response"]
        assert (done["status"], done["output"], done["usage"]) == ("cancelled", [], None)
        assert dialogue(running).rounds == 0
        expected = say(Session(model, mode="a2t", max_new_tokens=limit), english + chinese)
        assert transcript(talk.ask(chinese)) == expected.text
    assert running.idle()


def test_truncation_of_a_response_under_way_ends_it(running: Running, english: bytes, mute: threading.Event) -> None:
    with talking(running) as talk:
        mute.clear()
        talk.say(english)
        talk.commit()
        talk.send("response.create")
        item_id = talk.until("response.output_audio_transcript.delta")[-1]["item_id"]
        talk.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=0)
        events = talk.until("error")  # nothing was spoken yet
        assert "response.done" in kinds(events) and "only one that was spoken" in events[-1]["error"]["message"]


def test_a_fault_ends_the_response_and_not_the_session(
    model: CovoAudio, running: Running, english: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with talking(running) as talk:
        with monkeypatch.context() as once:
            once.setattr(running.service.worker.engine._decoder, "fill", lambda *_: 1 / 0)
            events = talk.ask(english)
        failed = events[-2]["response"]
        assert failed["status"] == "failed" and failed["output"] == []
        assert failed["status_details"]["error"] == {
            "type": "server_error", "code": "reply_failed", "message": "the reply failed; the server's log says why",
        }  # fmt: skip
        talk.send("response.create")  # the question is still there
        assert transcript(talk.until(LAST)) == say(Session(model), english).text


def test_a_dialogue_that_the_server_had_to_forget(model: CovoAudio, english: bytes) -> None:
    with serving(model, parked_bytes=1) as running, talking(running) as talk:
        assert talk.ask(english)[-2]["response"]["status"] == "completed"
        talk.say(english)
        talk.commit()
        talk.send("response.create", event_id="e1")
        error = talk.error()
        assert (error["code"], error["event_id"]) == ("dialogue_not_found", "e1")


# --- the conversation


def test_items(model: CovoAudio, running: Running, english: bytes, chinese: bytes) -> None:
    part = {"type": "input_audio", "audio": b64(english)}
    with talking(running, max_output_tokens=20) as talk:
        talk.send("conversation.item.create", item={"type": "message", "role": "user", "id": "q1", "content": [part]})
        added, done = talk.next("conversation.item.added"), talk.next("conversation.item.done")
        assert added["item"] == done["item"] and added["item"]["id"] == "q1" and added["previous_item_id"] is None
        talk.send("conversation.item.create", item={"type": "message", "role": "user", "id": "q2", "content": [part]})
        assert talk.until("conversation.item.done")[-1]["previous_item_id"] == "q1"
        talk.send("conversation.item.delete", item_id="q2")
        assert talk.next("conversation.item.deleted")["item_id"] == "q2"
        talk.say(chinese)
        last = talk.commit()
        talk.send("conversation.item.retrieve", item_id=last)
        assert talk.next("conversation.item.retrieved")["item"]["role"] == "user"
        talk.send("response.create")
        expected = say(Session(model, max_new_tokens=20), english + chinese)
        assert transcript(talk.until(LAST)) == expected.text
        for item_id, code in (("q1", "unsupported_value"), ("q2", "item_not_found")):
            talk.send("conversation.item.delete", item_id=item_id)
            assert talk.error()["code"] == code


def test_the_first_item_may_be_said_to_follow_the_root(running: Running, english: bytes) -> None:
    part = {"type": "input_audio", "audio": b64(english)}
    with talking(running) as talk:
        for wrong in (False, True):
            talk.send("conversation.item.create", item=user(part), previous_item_id="root")
            talk.error() if wrong else talk.until("conversation.item.done")


def test_an_interrupted_round_counts_as_use(model: CovoAudio, english: bytes, slow: None) -> None:
    with serving(model) as running, talking(running) as first, talking(running) as second:
        held = running.service.worker.dialogues._held
        for talk in (first, second):
            talk.ask(english)
        oldest = next(iter(held))
        first.say(english)
        first.commit()
        first.send("response.create")
        first.until("response.output_audio_transcript.delta")
        first.send("response.cancel")
        first.until(LAST)
        assert list(held)[-1] is oldest


def test_what_takes_no_memory_is_not_forgotten_for_it(model: CovoAudio) -> None:
    engine, now = Engine(model), [0.0]
    dialogues = Dialogues(engine, 100 * engine.row_bytes, 3600, lambda: now[0])
    fresh, used = Dialogue(), [Dialogue(mark=Mark(1, 60, ())) for _ in range(2)]
    for dialogue in (fresh, *used):
        dialogues.hold(dialogue)
    assert [dialogue in dialogues for dialogue in (fresh, *used)] == [True, False, True]
    now[0] = 4000
    dialogues.trim()
    assert not len(dialogues)


def test_questions_that_nobody_asks_are_bounded(running: Running) -> None:
    """Together they last no longer than the buffer: more could never be asked. What leaves makes room again."""
    piece = bytes([255]) * 8_000 * 150  # G.711
    part = {"type": "input_audio", "audio": b64(piece)}
    with talking(running, output_modalities=["text"], max_output_tokens=1, input_audio_format="g711_ulaw") as talk:
        assert 300 < running.service.max_seconds < 450
        talk.say(piece, len(piece))
        first = talk.commit()
        talk.send("conversation.item.create", item=user(part))
        second = talk.until("conversation.item.done")[-1]["item"]["id"]
        for _ in range(2):
            talk.say(piece, len(piece))
            talk.send("input_audio_buffer.commit")
            error = talk.error()
            assert error["code"] == "context_length_exceeded" and "450.0 s would wait" in error["message"]
            talk.send("conversation.item.create", item=user(part, id="third"))
            assert talk.error()["message"] == error["message"]
        for item_id in (first, second):
            talk.send("conversation.item.delete", item_id=item_id)
            talk.next("conversation.item.deleted")
        talk.send("conversation.item.create", item=user(part, id="third"))
        talk.until("conversation.item.done")
        talk.send("response.create")
        assert talk.until(LAST)[-2]["response"]["status"] == "incomplete"
        for _ in range(2):
            talk.say(piece, len(piece))
            talk.commit()


def user(*content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": list(content), **fields}


SHORT = b64(bytes(480))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {  # case: (event, code)
    "unknown": ({"type": "response.sing"}, "invalid_value"),
    "no type": ({"typ": "x"}, "missing_required_parameter"),
    "append nothing": ({"type": "input_audio_buffer.append"}, "invalid_audio"),
    "append number": ({"type": "input_audio_buffer.append", "audio": 5}, "invalid_audio"),
    "append garbage": ({"type": "input_audio_buffer.append", "audio": "%%%"}, "invalid_audio"),
    "append half": ({"type": "input_audio_buffer.append", "audio": b64(b"abc")}, "invalid_value"),
    "commit nothing": ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
    "no question": ({"type": "response.create"}, "conversation_has_no_question"),
    "nothing to cancel": ({"type": "response.cancel"}, "response_cancel_not_active"),
    "out of band": ({"type": "response.create", "response": {"conversation": "none"}}, "unsupported_value"),
    "own input": ({"type": "response.create", "response": {"input": [user()]}}, "unsupported_value"),
    "response tools": ({"type": "response.create", "response": {"tools": [{}]}}, "unsupported_value"),
    "text item": ({"type": "conversation.item.create", "item": user({"type": "input_text", "text": "x"})},
                  "unsupported_value"),
    "assistant item": ({"type": "conversation.item.create", "item": {**user(), "role": "assistant"}},
                       "unsupported_value"),
    "empty item": ({"type": "conversation.item.create", "item": user()}, "invalid_value"),
    "short item": ({"type": "conversation.item.create", "item": user({"type": "input_audio", "audio": b64(bytes(10))})},
                   "input_audio_buffer_commit_empty"),
    "long id": ({"type": "conversation.item.create",
                 "item": user({"type": "input_audio", "audio": SHORT}, id="x" * 65)}, "invalid_value"),
    "inserted item": ({"type": "conversation.item.create", "previous_item_id": "item_elsewhere",
                       "item": user({"type": "input_audio", "audio": SHORT})}, "unsupported_value"),
    "truncate nothing": ({"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 1},
                         "item_not_found"),
    "retrieve nothing": ({"type": "conversation.item.retrieve"}, "missing_required_parameter"),
    "webrtc": ({"type": "output_audio_buffer.clear"}, "invalid_value"),
    "no session": ({"type": "session.update"}, "invalid_type"),
    "transcription": ({"type": "session.update", "session": {"type": "transcription"}}, "unsupported_value"),
    "other model": ({"type": "session.update", "session": {"model": "gpt"}}, "unsupported_value"),
    "both modalities": ({"type": "session.update", "session": {"output_modalities": ["text", "audio"]}},
                        "unsupported_value"),
    "tools": ({"type": "session.update", "session": {"tools": [{"type": "function"}]}}, "unsupported_value"),
    "voice": ({"type": "session.update", "session": {"voice": "darth"}}, "invalid_value"),
    "speed": ({"type": "session.update", "session": {"audio": {"output": {"speed": 1.5}}}}, "unsupported_value"),
    "semantic": ({"type": "session.update", "session": {"turn_detection": {"type": "semantic_vad"}}},
                 "unsupported_value"),
    "unasked": ({"type": "session.update",
                 "session": {"turn_detection": {"type": "server_vad", "idle_timeout_ms": 6000}}}, "unsupported_value"),
    "threshold": ({"type": "session.update", "session": {"turn_detection": {"type": "server_vad", "threshold": 2}}},
                  "invalid_type"),
    "rate": ({"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 1}}}}},
             "unsupported_value"),
    "spoken g711": ({"type": "session.update", "session": {"output_audio_format": "g711_ulaw"}}, "unsupported_value"),
    "spoken rate": ({"type": "session.update",
                     "session": {"audio": {"output": {"format": {"type": "audio/pcm", "rate": 16000}}}}},
                    "unsupported_value"),
    "format": ({"type": "session.update", "session": {"input_audio_format": "mp3"}}, "invalid_type"),
    "limit": ({"type": "session.update", "session": {"max_output_tokens": 0}}, "invalid_value"),
    "temperature": ({"type": "session.update", "session": {"temperature": -1}}, "invalid_value"),
    "audio is a list": ({"type": "session.update", "session": {"audio": [], "voice": "alloy"}}, "invalid_type"),
}  # fmt: skip


def test_what_cannot_be_done_is_told_and_changes_nothing(model: CovoAudio, running: Running, english: bytes) -> None:
    """All in one session: errors do not end it, and name the event that caused them."""
    with talking(running) as talk:
        before = talk.update(type="realtime")
        for case, (event, code) in REFUSED.items():
            talk.connection.send({**event, "event_id": f"event of {case}"})  # type: ignore[arg-type]
            error = talk.error()
            assert (error["code"], error["event_id"]) == (code, f"event of {case}"), (case, error)
            assert error["type"] == "invalid_request_error" and len(error["message"]) > 10
        assert talk.update(type="realtime") == before
        assert transcript(talk.ask(english)) == say(Session(model), english).text


@pytest.mark.parametrize("limit", ["many", 1.5, {}])
def test_a_field_of_several_types_is_named_as_it_was_sent(running: Running, limit: Any) -> None:
    with talking(running) as talk:
        talk.send("session.update", session={"max_output_tokens": limit})
        error = talk.error()
        assert (error["param"], error["message"].count("max_output_tokens")) == ("session.max_output_tokens", 1), error
        assert talk.update(max_output_tokens="inf")["max_output_tokens"] == "inf"


def test_half_a_character_is_refused_wherever_it_stands(running: Running) -> None:
    """JSON can spell it, UTF-8 cannot: no event could say it again. A whole one in two halves is one character."""
    item = user({"type": "input_audio", "audio": SHORT})
    events: tuple[dict[str, Any], ...] = (
        {"type": "response.sing", "event_id": "\ud800"},
        {"type": "response.\udfff", "event_id": "e"},
        {"type": "conversation.item.create", "item": {**item, "id": "\udead"}},
        {"type": "conversation.item.retrieve", "item_id": "\ud83d"},
        {"type": "session.update", "session": {"type": "realtime", "instructions": "\ude00\ud83d"}},
        {"type": "session.update", "session": {"type": "realtime", "metadata": {"\ud800": 1}}},
    )
    with talking(running) as talk:
        for event in events:
            talk.connection.send(event)  # type: ignore[arg-type]
            error = talk.error()
            assert (error["code"], error["type"]) == ("invalid_json", "invalid_request_error"), event
        talk.connection._connection.send(r'{"type": "response.sing", "event_id": "\ud83d\ude00"}')
        assert talk.error()["event_id"] == "😀"
        talk.send("conversation.item.create", item=item)
        assert talk.next("conversation.item.added")["previous_item_id"] is None


def test_truncation_has_limits(running: Running, english: bytes, chinese: bytes) -> None:
    with talking(running) as talk:
        events = talk.ask(english)
        first, length_ms = events[-2]["response"]["output"][0]["id"], len(pcm(events)) // 48

        def truncate(item_id: str, end_ms: Any, index: Any = 0) -> dict[str, Any]:
            talk.send("conversation.item.truncate", item_id=item_id, content_index=index, audio_end_ms=end_ms)
            return talk.next("error", "conversation.item.truncated")

        for end_ms, index in ((length_ms + 2000, 0), (-1, 0), ("1", 0), (True, 0), (1.5, 0), (40, 1), (40, None)):
            assert truncate(first, end_ms, index)["error"]["code"] == "invalid_value"
        whole = dialogue(running).mark
        assert truncate(first, length_ms + 500)["audio_end_ms"] == length_ms + 500  # the player ran ahead
        assert dialogue(running).mark == whole
        talk.ask(chinese)
        assert truncate(first, 40)["error"]["code"] == "unsupported_value"


def test_a_response_at_a_time(running: Running, english: bytes, slow: None) -> None:
    with talking(running) as talk:
        talk.say(english)
        question = talk.commit()
        talk.send("response.create")
        response_id = talk.next("response.created")["response"]["id"]
        talk.send("response.create", event_id="again")
        talk.send("response.cancel", response_id="resp_other")
        talk.send("conversation.item.delete", item_id=question)
        talk.send("session.update", session={"type": "realtime", "instructions": "Sing."})
        talk.send("response.cancel", response_id=response_id)
        events = talk.until("response.done")
        errors = [event["error"]["code"] for event in events if event["type"] == "error"]
        assert errors[:2] == ["conversation_already_has_active_response", "response_cancel_not_active"]
        assert errors[2:] == ["invalid_value", "unsupported_value"]
        assert events[-1]["response"]["status"] == "cancelled"


# --- sessions


def test_beta_spellings_say_the_same(running: Running) -> None:
    vad = {"type": "server_vad", "threshold": 0.6, "silence_duration_ms": 700}
    today = {
        "type": "realtime", "output_modalities": ["audio"], "instructions": "Be brief.", "max_output_tokens": 99,
        "audio": {
            "input": {"format": {"type": "audio/pcmu"}, "turn_detection": vad, "transcription": None},
            "output": {"format": {"type": "audio/pcm", "rate": 24000}, "voice": "coral"},
        },
    }  # fmt: skip
    beta = {
        "modalities": ["text", "audio"], "instructions": "Be brief.", "max_response_output_tokens": 99,
        "input_audio_format": "g711_ulaw", "turn_detection": vad, "input_audio_transcription": {"model": "whisper-1"},
        "output_audio_format": "pcm16", "voice": "coral", "tools": [], "tool_choice": "auto", "temperature": 0.8,
    }  # fmt: skip
    found = []
    for said in (today, beta):
        with running.client().realtime.connect(model=MODEL) as connection:
            talk = Talk(connection)
            begun = talk.session
            found.append(talk.update(**said))
            assert talk.update() == found[-1]
            assert {key for key, value in begun.items() if value != found[-1].get(key)} - {"temperature"} == {
                "audio", "instructions", "max_output_tokens",
            }  # fmt: skip
    first, second = ({k: v for k, v in session.items() if k not in ("id", "expires_at")} for session in found)
    assert second.pop("temperature") == 0.8
    assert first == second and first["audio"]["input"]["turn_detection"]["silence_duration_ms"] == 700
    assert first["audio"]["input"]["turn_detection"]["create_response"] is True


def test_instructions_are_the_system_prompt(model: CovoAudio, running: Running, english: bytes, chinese: bytes) -> None:
    chat = Session(model, max_new_tokens=20, system="Answer in one word.")
    with talking(running, max_output_tokens=20, instructions="Answer in one word.") as talk:
        assert transcript(talk.ask(english)) == say(chat, english).text
        talk.send("session.update", session={"instructions": "Answer at length."})
        assert talk.error()["param"] == "session.instructions"
        assert talk.update(instructions="Answer in one word.", voice="alloy")["instructions"] == "Answer in one word."
        assert transcript(talk.ask(chinese)) == say(chat, chinese).text


def test_instructions_that_no_context_holds_are_refused_when_they_are_said(running: Running, english: bytes) -> None:
    long = "a" * (running.service.max_system_characters + 1)
    with talking(running, instructions="Be brief.", max_output_tokens=1) as talk:
        talk.send("session.update", session={"instructions": long})
        assert talk.error()["code"] == "context_length_exceeded"
        talk.say(english)
        talk.commit()
        talk.send("response.create", response={"instructions": long})
        assert talk.error()["code"] == "context_length_exceeded"
        assert talk.update()["instructions"] == "Be brief."


def test_a_response_may_repeat_the_instructions_that_opened_its_dialogue(running: Running, english: bytes) -> None:
    with talking(running, max_output_tokens=5) as talk:
        for _ in range(2):
            assert talk.ask(english, instructions="Be brief.")[-2]["response"]["status"] == "incomplete"
        talk.say(english)
        talk.commit()
        talk.send("response.create", response={"instructions": "Be long."})
        assert "stays as it is" in talk.error()["message"]


def test_the_default_instructions_are_shown(running: Running) -> None:
    from covo_npu.runtime.prompt import DEFAULT_SYSTEM_PROMPT

    with talking(running) as talk:
        assert talk.session["instructions"] == DEFAULT_SYSTEM_PROMPT
        assert talk.session["type"] == "realtime" and talk.session["model"] == MODEL


def test_a_buffer_by_hand_is_cleared_and_bounded(model: CovoAudio, running: Running, english: bytes) -> None:
    with talking(running, max_output_tokens=5) as talk:
        talk.say(english)
        talk.send("input_audio_buffer.clear")
        talk.next("input_audio_buffer.cleared")
        text = say(Session(model, max_new_tokens=5), english).text
        assert transcript(talk.ask(english)) == text
        limit = running.service.max_seconds
        piece = bytes(10 * 48_000)
        for _ in range(int(limit // 10)):
            talk.send("input_audio_buffer.append", audio=b64(piece))
        talk.send("input_audio_buffer.append", audio=b64(piece))
        assert talk.error()["code"] == "input_audio_buffer_full"
        talk.send("session.update", session={"input_audio_format": "g711_ulaw"})
        assert "commit or clear" in talk.error()["message"]
        talk.commit()
        talk.send("response.create")
        assert talk.error()["code"] == "context_length_exceeded"
        talk.next("conversation.item.deleted")  # or every later question would be too long as well
        assert talk.ask(english)[-2]["response"]["status"] == "incomplete"  # after five tokens, as they all are


def test_a_turn_that_fills_the_buffer_ends_there(english: bytes) -> None:
    """However long somebody, or a television, speaks: what comes then is heard, too."""
    hearing = Hearing(Format(type="audio/pcm"), TurnDetection(type="server_vad"), 1.5)
    found: list[tuple[str, int, int]] = []
    for begin in range(0, 3 * len(english), 4800):
        piece = (english * 3 + bytes(2 * RATE))[begin : begin + 4800]
        for turn in hearing.append(piece):
            found.append((type(turn).__name__, turn.at_ms, hearing.end_ms))
            if isinstance(turn, SpeechStopped):
                hearing.take(found[-2][1], turn.at_ms)
        hearing.trim()
    assert [name for name, *_ in found] == ["SpeechStarted", "SpeechStopped"] * (len(found) // 2) and len(found) >= 8
    # the detector judges windows of 32 ms: a turn may begin in the one in which the last one ended
    assert all(later[1] - earlier[1] <= 1532 for earlier, later in zip(found[::2], found[1::2]))
    assert any(later[1] - earlier[1] > 1300 for earlier, later in zip(found[::2], found[1::2]))
    with pytest.raises(ApiError, match="holds 2 s at most"):
        hearing.append(bytes(4 * RATE))


def test_empty_pieces_take_no_memory() -> None:
    hearing = Hearing(Format(type="audio/pcm"), None, 1)
    for _ in range(1000):
        assert hearing.append(b"") == []
    assert len(hearing._pieces) < 3


def test_a_fault_of_one_turn_leaves_the_others(
    running: Running, english: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    detection = {"type": "server_vad", "create_response": False}
    with talking(running, turn_detection=detection) as talk:
        [session] = running.service.sessions
        ask, full = session._conversation.ask, [ApiError(400, "full", "full")]

        def once(*args: Any) -> Any:
            if full:
                raise full.pop()
            return ask(*args)

        monkeypatch.setattr(session._conversation, "ask", once)
        talk.say(2 * (english + bytes(2 * RATE)), 10**7)
        told = kinds(talk.until("conversation.item.done"))
    turn = ["input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped"]
    assert told == [*turn, "error", *turn, *COMMITTED]


def test_other_settings_of_turns_drop_the_one_that_is_going_on(running: Running, english: bytes) -> None:
    with talking(running, turn_detection={"type": "server_vad"}) as talk:
        talk.say(bytes(RATE) + english[: len(english) // 2])
        talk.until("input_audio_buffer.speech_started")
        talk.send("session.update", session={"turn_detection": {"type": "server_vad", "silence_duration_ms": 900}})
        talk.next("input_audio_buffer.cleared")
        talk.next("session.updated")


def test_a_format_spelled_otherwise_is_the_same(running: Running, english: bytes) -> None:
    with talking(running) as talk:
        talk.say(english)
        talk.update(type="realtime", audio={"input": {"format": {"type": "audio/pcm"}}})
        talk.commit()


def test_silence_is_not_kept(running: Running) -> None:
    with talking(running, turn_detection={"type": "server_vad"}) as talk:
        for _ in range(60):
            talk.say(bytes(48_000), 48_000)
        talk.update()
        [session] = running.service.sessions
        assert session._hearing._size < 24_000 and session._hearing.end_ms == 60_000


def test_turns_may_be_noticed_and_not_answered(running: Running, english: bytes, slow: None) -> None:
    detection = {"type": "server_vad", "create_response": False, "interrupt_response": False}
    with talking(running, turn_detection=detection) as talk:
        talk.say(english + bytes(2 * RATE))
        events = talk.until("conversation.item.done")
        assert kinds(events)[0] == "input_audio_buffer.speech_started"
        talk.send("response.create")
        talk.until("response.output_audio_transcript.delta")
        talk.say(english + bytes(2 * RATE))
        done = talk.until("response.done")[-1]["response"]
        assert done["status"] == "completed"
        assert running.metric("realtime_turns_total") >= 2


# --- how a session begins and ends


def test_sessions_are_counted(model: CovoAudio) -> None:
    with serving(model, sessions=1) as running, talking(running):
        with pytest.raises(Exception, match="429"), running.client().realtime.connect(model=MODEL):
            pass
        assert running.metric("realtime_sessions") == 1


def test_other_models_have_no_sessions(running: Running) -> None:
    with pytest.raises(Exception, match="404"), running.client().realtime.connect(model="gpt-realtime"):
        pass


def test_an_idle_session_ends(model: CovoAudio, english: bytes, mute: threading.Event) -> None:
    with serving(model, idle_s=0.5) as running, talking(running) as talk:
        mute.clear()
        talk.say(english)
        talk.commit()
        talk.send("response.create")
        talk.until("response.output_audio_transcript.delta")
        time.sleep(0.8)  # while it is answered a session is not idle
        began = time.monotonic()
        mute.set()
        assert talk.until("response.done")[-1]["response"]["status"] == "completed"
        done = time.monotonic()
        assert talk.until("error")[-1]["error"]["code"] == "session_idle"
        assert began + 0.5 <= time.monotonic() < done + 5
        with pytest.raises(Exception, match="nothing was sent"):
            talk.next()
        assert running.idle() and not running.service.sessions


def test_a_session_ends_in_time(model: CovoAudio, english: bytes, mute: threading.Event) -> None:
    """Also if it is being answered."""
    with serving(model, session_s=0.6) as running, talking(running) as talk:
        assert abs(talk.session["expires_at"] - time.time()) < 5
        mute.clear()
        talk.say(english)
        talk.commit()
        talk.send("response.create")
        assert talk.until("error")[-1]["error"]["code"] == "session_expired"
        with pytest.raises(Exception, match="as long as one may"):
            talk.until(LAST)
        mute.set()
        assert running.idle()


def test_client_secrets(model: CovoAudio, english: bytes) -> None:
    """A secret opens sessions as it was asked for, until it expires; it opens nothing else."""
    with serving(model, api_keys=("key",)) as running:
        said = {"type": "realtime", "instructions": "Be brief.", "audio": {"input": {"turn_detection": None}}}
        found = running.client("key").realtime.client_secrets.create(
            expires_after={"anchor": "created_at", "seconds": 60},
            session=said,  # type: ignore[arg-type]
        )
        TypeAdapter(ClientSecretCreateResponse).validate_python(found.to_dict(mode="json"))
        assert found.value.startswith("ek_") and abs(found.expires_at - time.time() - 60) < 5
        with running.client(found.value).realtime.connect(model=MODEL) as connection:
            talk = Talk(connection)
            assert talk.session["instructions"] == "Be brief."
            assert talk.session["audio"]["input"]["turn_detection"] is None
            talk.update(max_output_tokens=30)
            expected = say(Session(model, system="Be brief.", max_new_tokens=30), english)
            assert transcript(talk.ask(english)) == expected.text
        with pytest.raises(openai.AuthenticationError):
            running.client(found.value).models.list()
        with pytest.raises(openai.AuthenticationError):
            running.client("ek_none").realtime.client_secrets.create()
        with pytest.raises(openai.BadRequestError, match=r"tools"):
            running.client("key").realtime.client_secrets.create(
                session={"type": "realtime", "tools": [{"type": "function"}]}
            )
        with pytest.raises(openai.BadRequestError, match=r"expires_after.seconds"):
            running.client("key").realtime.client_secrets.create(expires_after={"seconds": 1})
        running.service.secrets._clock = lambda: time.time() + 61
        with pytest.raises(Exception, match="401"), running.client(found.value).realtime.connect(model=MODEL):
            pass
