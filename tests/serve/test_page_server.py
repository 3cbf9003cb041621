"""The page, the server and the model together: what is seen and heard is what the model answers to what was said."""

from __future__ import annotations

import re
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, expect
from serve.browser import Talker, launch, opened
from serve.harness import ENGLISH, Running, program, serving
from serve.scripted import RATE

from covo_npu.runtime import Ask, CovoAudio, Reply, Sampling, Session
from covo_npu.runtime.audio import to_pcm16
from covo_npu.runtime.events import Done

SHORT = Ask(max_new_tokens=60)
LONG = Ask(sampling=Sampling(temperature=1.0), max_new_tokens=400, seed=8)  # answers ENGLISH for 2 s
CODE_MS = 40
KEY = "was nur Freunde wissen: 朋友"  # fetch takes no such text for a header


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of the tiny model gain nothing from a second core, and the browser needs it."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Running], None]:
    """A function: each step of this server's engine takes a tenth of a second from now on."""

    def slowed(running: Running) -> None:
        engine = running.service.worker.engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.1), step())[1])

    return slowed


def shown(talker: Talker, number: int) -> str:
    """The text of a reply on the page."""
    return str(talker.replies.nth(number).locator(".words").evaluate("node => node.textContent"))


def sounding(data: bytes) -> np.ndarray:
    """Samples of PCM that are not 0, as Talker.played() gives them."""
    samples = np.frombuffer(data, "<i2")
    return samples[samples != 0]


def answer(chat: Session, question: np.ndarray) -> Reply:
    """What a session answers to Int16 samples of the page."""
    *_, done = chat.stream(question.astype(np.float32) / 32768, RATE)
    assert isinstance(done, Done)
    return done.reply


def left(server: Running) -> bool:
    """Whether a page that was closed leaves nothing behind."""
    end = time.monotonic() + 10
    while server.service.sessions and time.monotonic() < end:
        time.sleep(0.01)
    return server.idle() and not server.service.sessions


def deltas(events: list[dict[str, Any]], response: str, kind: str) -> list[str]:
    return [e["delta"] for e in events if e["type"] == f"response.{kind}.delta" and e["response_id"] == response]


def test_press_talk_hear_twice(model: CovoAudio, chromium: Browser) -> None:
    chat = Session(model, SHORT)
    with serving(model, ask=SHORT) as server:
        with opened(chromium, f"{server.url}/") as talker:
            talker.accessible()
            for number in range(2):
                talker.forget()
                talker.hold(900)
                reply = talker.ended(number)
                expected = answer(chat, talker.saved(talker.questions.nth(number)))
                assert shown(talker, number) == expected.text
                wanted = to_pcm16(expected.waveform)
                assert np.array_equal(talker.played(), sounding(wanted))
                assert not wanted or talker.saved(reply).tobytes() == wanted
            talker.accessible()
            expect(talker.notice).to_have_count(0)
            talker.shot("real")
            assert not [event for event in talker.received if event["type"] == "error"]
        assert left(server)


@pytest.mark.slow
def test_the_model_remembers_what_was_heard_before_a_press(model: CovoAudio, chromium: Browser) -> None:
    with serving(model, ask=LONG) as server, opened(chromium, f"{server.url}/") as talker:
        talker.upload(ENGLISH)
        talker.is_said("speaking")
        talker.page.wait_for_timeout(200)
        talker.hold(600)
        talker.ended(1)
        first, second = (talker.saved(talker.questions.nth(n)) for n in range(2))
        whole = answer(Session(model, LONG), first)
        played, text = talker.played(), shown(talker, 1)
        # stopped: all of it that had been made was heard by then
        expect(talker.replies.first.locator(".figures")).to_contain_text(re.compile("interrupted after|stopped"))
        (cut,) = (event for event in talker.sent if event["type"] == "conversation.item.truncate")
        assert not [event for event in talker.received if event["type"] == "error"]
    codes = cut["audio_end_ms"] // CODE_MS
    assert 0 < codes < len(whole.audio_codes), "the reply was too short to interrupt it"
    # A dialogue whose first reply ended with the last code that was heard.
    ends = [n for n, token in enumerate(whole.tokens, 1) if token >= model.config.audio_token_index]
    chat = Session(model, LONG, max_new_tokens=ends[codes - 1] + 1)
    answer(chat, first)
    chat.ask = LONG
    expected = answer(chat, second)
    assert text == expected.text
    begun, following = (sounding(to_pcm16(reply.waveform)) for reply in (whole, expected))
    begun = begun[: played.size - following.size]
    assert begun.size and np.array_equal(played, np.concatenate([begun, following]))


def test_hands_free_until_somebody_speaks_again(
    model: CovoAudio, chromium: Browser, slow: Callable[[Running], None]
) -> None:
    """The microphone says its sentence again while the model still answers the first time."""
    with serving(model, ask=SHORT) as server:
        slow(server)
        with opened(chromium, f"{server.url}/") as talker:
            talker.page.get_by_label("Hands-free").check()
            talker.talk.click()
            expect(talker.replies).to_have_count(2, timeout=40_000)
            talker.talk.click()
            talker.stop.click()
            talker.is_said("readyHandsFree")
            expect(talker.notice).to_have_count(0)
            received = talker.received
            done = [event["response"] for event in received if event["type"] == "response.done"]
            assert (done[0]["status"], done[0]["status_details"]["reason"]) == ("cancelled", "turn_detected")
            starts = [n for n, event in enumerate(received) if event["type"] == "input_audio_buffer.speech_started"]
            words = "".join(deltas(received[: starts[1]], done[0]["id"], "output_audio_transcript"))
            assert shown(talker, 0) == words
            assert not [event for event in received if event["type"] == "error"]
            talker.shot("real-hands-free")
        assert left(server)


def test_a_key_and_a_file_where_there_is_no_microphone(model: CovoAudio, chromium: Browser) -> None:
    browser = launch(chromium.browser_type)
    with (
        serving(model, ask=SHORT, api_keys=(KEY,)) as server,
        opened(browser, f"{server.url}/", faults="401") as talker,
    ):
        expect(talker.notice).to_contain_text("asks for an API key")
        talker.settings(key=KEY)
        expect(talker.page.locator("#model")).to_have_text("covo-audio-chat")
        talker.talk.click()
        expect(talker.notice).to_contain_text("No microphone was found")
        talker.is_said("ready")
        assert not talker.sent
        talker.upload(ENGLISH)
        reply = talker.ended()
        expect(talker.notice).to_have_count(0)
        expected = answer(Session(model, SHORT), talker.saved(talker.questions))
        assert shown(talker, 0) == expected.text
        assert talker.saved(reply).tobytes() == to_pcm16(expected.waveform)
    browser.close()


def test_a_server_that_dies_in_the_middle(convert_tiny: Callable[[str], Path], chromium: Browser) -> None:
    options = ["--ckpt", convert_tiny("float32"), "--slots", "1", "--max-context", "2600", "--threads", "1"]
    asking = ["--temperature", "1.0", "--max-new-tokens", "400", "--seed", "8"]  # LONG
    with program(*options, *asking) as (process, url), opened(chromium, f"{url}/", faults="WebSocket|ERR_") as talker:
        talker.upload(ENGLISH)
        talker.is_said("speaking")
        process.kill()
        expect(talker.notice).to_contain_text("The connection to the server is lost")
        reply = talker.ended()
        (response,) = (e["response"]["id"] for e in talker.received if e["type"] == "response.created")
        assert shown(talker, 0) == "".join(deltas(talker.received, response, "output_audio_transcript"))
        arrived = b"".join(map(b64decode, deltas(talker.received, response, "output_audio")))
        assert (
            arrived and talker.saved(reply).tobytes() == arrived and np.array_equal(talker.played(), sounding(arrived))
        )
        talker.talk.click()
        expect(talker.notice).to_contain_text("The server cannot be reached")
        talker.is_said("ready")
        talker.accessible()
        talker.shot("real-dead")
