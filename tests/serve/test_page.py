"""The page in a browser, against a server that says what a test wants: talk, hear, interrupt, and what can go wrong."""

import re
import time
from http import HTTPStatus

import numpy as np
import pytest
import soundfile
import torch
from playwright.sync_api import expect
from serve.browser import INSECURE, launch, opened, speech
from serve.scripted import RATE, Scripted, response

from covo_npu.runtime.audio import read_audio
from covo_npu.runtime.resampling import resample

FRAME = RATE // 25  # samples that the page sends at a time
PIECE = 3 * FRAME  # samples of a question that are compared at a time
SPOKEN = [("text", "The sky looks "), ("audio", speech(0.25, 1)), ("text", "blue."), ("audio", speech(0.3, 2))]
SAMPLES = np.concatenate([value for kind, value in SPOKEN if kind == "audio"])
LONG = [("text", "A long story."), ("audio", speech(6, 3))]
# Keeps the tracks of the microphones that are opened.
WATCH = """() => { window.tracks = []; const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
    navigator.mediaDevices.getUserMedia = async (given) => {
      const stream = await ask(given); window.tracks.push(...stream.getTracks()); return stream; }; }"""


@pytest.fixture
def at(chromium):
    """A function: (server, ...) => a page of it that is open, as a context."""
    return lambda server, **options: opened(chromium, server.url, **options)


def types(server):
    """What the client sent, appended audio as one."""
    found = [event["type"] for event in server.events]
    return [name for name, before in zip(found, [None, *found]) if name != before or not name.endswith("append")]


def test_press_talk_hear(at):
    waits = [("wait", 0.5), SPOKEN[0], ("wait", 0.6), *SPOKEN[1:]]
    with Scripted([waits]) as server, at(server) as talker:
        expect(talker.page.locator("#model")).to_have_text("covo-audio-chat")
        talker.accessible()
        talker.shot("welcome")
        before = time.monotonic()
        given_s = talker.hold(900)
        held_s = time.monotonic() - before
        talker.is_said("thinking")
        expect(talker.replies.locator(".words")).to_have_text("The sky looks ")  # as it comes
        talker.is_said("speaking")
        talker.shot("speaking")
        reply = talker.ended()
        talker.is_said("ready")
        expect(reply.locator(".words")).to_have_text("The sky looks blue.")
        assert np.array_equal(talker.played(), SAMPLES) and np.array_equal(talker.saved(reply), SAMPLES)
        most_s = time.monotonic() - before
        first, rtf, *_ = reply.locator(".figures span").all_text_contents()
        # 0.5 s and 0.6 s of waiting came before the first sound; 1.1 s for 0.55 s of speech are its RTF.
        assert 1100 < int(re.fullmatch(r"heard after ([\d,]+) ms", first)[1].replace(",", "")) < 1000 * most_s
        assert 1.1 / 0.55 < float(re.fullmatch(r"RTF ([\d.]+)", rtf)[1]) < most_s / 0.55
        talker.accessible()
    assert types(server) == ["session.update", "input_audio_buffer.append", "input_audio_buffer.commit",
                             "response.create"]  # fmt: skip
    session = server.events[0]["session"]
    assert session["audio"]["input"] == {"format": {"type": "audio/pcm", "rate": RATE}, "turn_detection": None}
    assert {"instructions", "temperature", "seed"}.isdisjoint(session)
    # What was begun of a frame when it ended is not sent.
    assert 0 < given_s * RATE - 2 * FRAME <= server.heard.size <= held_s * RATE + FRAME


def test_the_page_runs_nothing_but_its_own_scripts(at):
    with Scripted([SPOKEN]) as server, at(server, tap=False, faults="Content Security Policy") as talker:
        talker.hold()
        talker.ended()  # what it needs is allowed
        inject = """(text) => { const script = document.createElement("script"); script.textContent = text;
            document.body.append(script); return window.injected; }"""
        assert talker.page.evaluate(inject, "window.injected = true") is None
        assert talker.page.evaluate("fetch('http://127.0.0.1:1/').catch((error) => error.name)") == "TypeError"


def test_what_is_said_is_what_the_server_hears(at, question_wav):
    recording, rate = read_audio(question_wav)
    said = np.tile(resample(recording, rate, RATE, torch.float64).numpy(), 2)  # over and over
    # In pieces, each where the recording is most like it: a browser that gets no processor time skips some of what its
    # microphone of a file says, several times a second where others run. Then it is asked again.
    for _ in range(8):
        with Scripted([SPOKEN]) as server, at(server) as talker:
            talker.settings(clean="off")  # the browser would remove noise and change the level
            talker.hold(2500)
            talker.ended()
            assert np.array_equal(talker.saved(talker.questions), server.heard)
            assert is_of(server.heard, *talker.microphone())
        pieces = (server.heard / 32768)[: server.heard.size // PIECE * PIECE].reshape(-1, PIECE)
        found = [likeness(piece, said) for piece in pieces if piece.std() > 0.01]  # the rest is the recording's silence
        levels = [level for correlation, level in found if correlation > 0.999999]
        if whole := len(found) >= 8 and len(levels) > len(found) / 8:
            break
    assert whole and 0.99 < np.median(levels) < 1.01


def is_of(heard, samples, rate):
    """Whether what a server heard is samples of a microphone at a rate, from a frame on, all rounded once."""
    whole = 32768 * resample(torch.from_numpy(samples), rate, RATE, torch.float64).numpy()
    begins = range(0, whole.size - heard.size + 1, FRAME)
    return any(np.abs(whole[begin : begin + heard.size] - heard).max() < 0.6 for begin in begins)


def likeness(piece, said):
    """Correlation of a piece with the part of a recording, there twice, that is most like it, and relative level."""
    begin = int(np.correlate(said[: said.size // 2 + piece.size], piece, "valid").argmax())
    there = said[begin : begin + piece.size]
    return np.corrcoef(there, piece)[0, 1], np.sqrt((piece**2).mean() / (there**2).mean())


def test_ways_to_press(at):
    with Scripted([SPOKEN]) as server, at(server, has_touch=True) as talker:
        keyboard, talk = talker.page.keyboard, talker.talk

        def held(key):
            keyboard.down(key)
            talker.is_said("recording")
            talker.page.wait_for_timeout(500)
            keyboard.up(key)

        def twice(act):
            act()
            talker.is_said("latched")
            talker.page.wait_for_timeout(200)
            act()

        def held_with_control():
            keyboard.down("Space")
            talker.is_said("recording")
            talker.page.wait_for_timeout(500)
            keyboard.down("Control")
            keyboard.up("Space")
            keyboard.up("Control")

        ways = (
            lambda: held("Space"),
            held_with_control,
            lambda: (talk.focus(), held("Enter")),
            lambda: twice(talk.click),
            lambda: twice(talk.tap),
            lambda: twice(lambda: talk.evaluate("button => button.click()")),  # as screen readers press it
        )
        for number, way in enumerate(ways):
            talker.forget()
            way()
            talker.ended(number)
            assert np.array_equal(talker.played(), SAMPLES), number
    assert len(server.of("response.create")) == len(ways)


def test_keys_that_are_meant_for_something_else_do_not_talk(at):
    with Scripted([SPOKEN]) as server, at(server) as talker:
        talker.hold()
        reply = talker.ended()
        asked = len(server.events)
        talker.forget()
        reply.get_by_role("button", name="Play:").focus()
        talker.page.keyboard.press("Space")
        expect(reply.get_by_role("button", name="Stop playing:")).to_be_visible()
        expect(reply.get_by_role("button", name="Play:")).to_be_visible()
        assert np.array_equal(talker.played(), SAMPLES)  # heard once more
        talker.page.locator("#settings-open").click()
        talker.page.locator("#system").press_sequentially("a b")
        talker.page.keyboard.press("Escape")
        assert len(server.events) == asked


def test_a_press_that_is_too_short_asks_nothing(at):
    with Scripted([SPOKEN]) as server, at(server) as talker:
        talker.hold()
        talker.ended()
        talker.page.evaluate(
            """async () => {
                const { RATE } = await import("/sound.js");
                const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
                talk.click(); await wait(50); talk.click();
            }"""
        )
        talker.page.wait_for_timeout(500)
    sent = types(server)
    # With the 200 ms from before the press it may just be long enough: it is one or the other, never half of it.
    assert sent.count("input_audio_buffer.commit") == sent.count("response.create")
    assert sent.count("input_audio_buffer.commit") + sent.count("input_audio_buffer.clear") == 2


def test_a_press_interrupts(at):
    late = {"type": "response.output_audio_transcript.delta", "delta": " never", "response_id": "resp_none"}
    with Scripted([[*LONG, ("event", late), ("wait", 3)], SPOKEN]) as server, at(server) as talker:
        talker.hold()
        talker.is_said("speaking")
        talker.page.wait_for_timeout(800)
        talker.hold()
        second = talker.ended(1)
        first = talker.replies.first
        expect(first.locator(".words")).to_have_text("A long story.")
        expect(first.locator(".figures")).to_contain_text("interrupted after")
        expect(second.locator(".words")).to_have_text("The sky looks blue.")
        played = talker.played()
    heard = played.size - SAMPLES.size  # of the first reply; silence between them was not kept
    assert np.array_equal(played[:heard], LONG[1][1][:heard]) and np.array_equal(played[heard:], SAMPLES)
    (cut,) = server.of("conversation.item.truncate")
    assert cut["content_index"] == 0
    # The loudspeaker is behind the count by its latency; and the server knows before it answers again.
    assert heard * 1000 / RATE - 150 <= cut["audio_end_ms"] <= heard * 1000 / RATE
    sent = types(server)
    cancel, truncate = sent.index("response.cancel"), sent.index("conversation.item.truncate")
    assert cancel < truncate < len(sent) - sent[::-1].index("input_audio_buffer.commit")
    assert [e["response"]["status"] for e in server.sent if e["type"] == "response.done"] == ["cancelled", "completed"]


def test_stop_button_and_escape(at):
    with Scripted([[*LONG, ("wait", 3)]]) as server, at(server) as talker:
        for stop in (talker.stop.click, lambda: talker.page.keyboard.press("Escape")):
            expect(talker.stop).to_be_disabled()
            talker.hold()
            talker.is_said("speaking")
            stop()
            talker.is_said("ready")
        assert server.gets(2, "response.cancel") and server.gets(2, "conversation.item.truncate")


def test_a_cancel_that_comes_too_late_is_no_problem(at):
    with Scripted([[("audio", speech(0.1))]]) as server, at(server) as talker:
        talker.hold()
        talker.ended()
        talker.page.evaluate("window.tapped = []")
        talker.page.keyboard.press("Escape")  # nothing to stop
        talker.hold()
        talker.ended(1)
        expect(talker.notice).to_have_count(0)


def test_hands_free(at):
    turns = [(300, 1500), (2900, 4000)]
    with Scripted([LONG, SPOKEN], turns=turns) as server, at(server) as talker:
        talker.page.get_by_label("Hands-free").check()
        talker.is_said("readyHandsFree")
        talker.talk.click()
        talker.is_said("waiting")
        talker.is_said("hearing")
        talker.is_said("speakingFree")
        talker.shot("hands-free")
        talker.is_said("hearing")  # the second turn interrupts
        talker.ended(1)
        talker.is_said("waiting")
        talker.talk.click()
        talker.is_said("readyHandsFree")
        played = talker.played()
        kept = [talker.saved(talker.questions.nth(n)) for n in range(2)]
    for (start, end), samples in zip(turns, kept):
        assert np.array_equal(samples, server.heard[start * RATE // 1000 : end * RATE // 1000])
    heard = played.size - SAMPLES.size
    assert np.array_equal(played[heard:], SAMPLES) and np.array_equal(played[:heard], LONG[1][1][:heard])
    (cut,) = server.of("conversation.item.truncate")
    assert heard * 1000 / RATE - 150 <= cut["audio_end_ms"] <= heard * 1000 / RATE
    detection = [e["session"]["audio"]["input"]["turn_detection"] for e in server.of("session.update")]
    assert detection[0]["type"] == "server_vad" and detection[0]["interrupt_response"] and detection[-1] is None
    assert not server.of("response.create", "input_audio_buffer.commit", "response.cancel")


def test_a_slow_reply_has_gaps_and_loses_nothing(at):
    script = [("audio", speech(0.3, 5)), ("wait", 1.0), ("audio", speech(0.6, 6))]
    with Scripted([script]) as server, at(server) as talker:
        talker.hold()
        reply = talker.ended()
        expect(reply.locator(".figures")).to_contain_text("1 gap")
        played = talker.played()
    assert np.array_equal(played, np.concatenate([script[0][1], script[2][1]]))


def test_without_https_the_page_says_why_and_takes_files(chromium, tmp_path):
    question = speech(0.7, 8)
    soundfile.write(tmp_path / "question.wav", question, RATE)
    (tmp_path / "notes.txt").write_text("no sound")
    with Scripted([SPOKEN]) as server:
        url = f"http://{INSECURE}:{server.port}/"
        with opened(chromium, url, faults="deprecated") as talker:
            for text in (f"{INSECURE}:{server.port}", f"ssh -N -L {server.port}:127.0.0.1:{server.port} {INSECURE}",
                         "--tls-cert", "audio file"):  # fmt: skip
                expect(talker.notice).to_contain_text(text)
            talker.accessible()
            talker.shot("no-https")
            talker.page.set_viewport_size({"width": 568, "height": 320})  # a phone that lies: the buttons stay in sight
            for part in ("#talk", ".modes", ".notice button"):
                expect(talker.page.locator(part)).to_be_in_viewport(ratio=1)
            talker.accessible()
            talker.page.get_by_role("button", name="Close").click()
            talker.talk.click()
            expect(talker.notice).to_contain_text("secure address")
            talker.upload(tmp_path / "question.wav")
            talker.ended()
            assert np.array_equal(talker.played(), SAMPLES)
            talker.upload(tmp_path / "notes.txt")
            expect(talker.notice).to_contain_text("notes.txt")
    assert np.array_equal(server.heard, question) and len(server.of("response.create")) == 1


def test_no_microphone(chromium):
    with Scripted([SPOKEN]) as server:
        browser = launch(chromium.browser_type)
        with opened(browser, server.url) as talker:
            talker.talk.click()
            expect(talker.notice).to_contain_text("No microphone was found")
            talker.is_said("ready")
            talker.accessible()
        browser.close()
        browser = launch(chromium.browser_type, "--use-fake-device-for-media-stream", "--deny-permission-prompts")
        with opened(browser, server.url, mic=False) as talker:
            talker.talk.click()
            expect(talker.notice).to_contain_text("The microphone is not allowed")
            talker.shot("not-allowed")
            talker.page.context.grant_permissions(["microphone"])
            talker.notice.get_by_role("button", name="Try again").click()
            expect(talker.notice).to_have_count(0)
            talker.hold()
            talker.ended()
        browser.close()
    assert len(server.connections) == 1  # only the question opened one


def test_a_microphone_that_another_program_holds(at):
    with Scripted([SPOKEN]) as server, at(server) as talker:
        talker.page.evaluate(
            """() => { navigator.mediaDevices.getUserMedia = async () => {
                throw new DOMException("in use", "NotReadableError"); }; }"""
        )
        talker.talk.click()
        expect(talker.notice).to_contain_text("Another program may be using it")


def test_a_question_that_was_given_up_is_none_of_the_next(at, tmp_path):
    question = speech(0.7, 8)
    soundfile.write(tmp_path / "question.wav", question, RATE)
    with Scripted([SPOKEN]) as server, at(server) as talker:
        talker.page.evaluate(WATCH)
        talker.talk.click()
        talker.is_said("latched")
        talker.page.wait_for_timeout(500)
        talker.upload(tmp_path / "question.wav")
        talker.ended()
        talker.talk.click()
        talker.is_said("latched")
        talker.page.wait_for_timeout(500)
        talker.page.evaluate("window.tracks[0].dispatchEvent(new Event('ended'))")  # the microphone is taken away
        expect(talker.notice).to_contain_text("No microphone was found")
        talker.hold()
        talker.ended(1)
        kept = [talker.saved(talker.questions.nth(n)) for n in range(2)]
    asked, held = [], []
    for event in server.events:
        if event["type"] == "input_audio_buffer.append":
            held.append(event["samples"])
        elif event["type"] == "input_audio_buffer.clear":
            held.clear()
        elif event["type"] == "input_audio_buffer.commit":
            asked.append(np.concatenate(held))
            held.clear()
    assert np.array_equal(asked[0], question) and all(map(np.array_equal, asked, kept))
    assert len(server.of("input_audio_buffer.clear")) == len(asked) == 2


def test_a_server_that_dies_in_the_middle(at):
    partial = [*SPOKEN, ("wait", 0.3), ("die", None)]
    with Scripted([partial, SPOKEN]) as server, at(server, faults="WebSocket") as talker:
        talker.hold()
        expect(talker.notice).to_contain_text("The connection to the server is lost")
        reply = talker.ended()
        expect(reply.locator(".words")).to_have_text("The sky looks blue.")
        expect(reply.locator(".figures")).to_contain_text("lost")
        assert np.array_equal(talker.played(), SAMPLES)  # what has arrived is heard
        talker.is_said("ready")
        talker.accessible()
        talker.shot("lost")
        talker.hold()
        talker.ended(1)
        expect(talker.notice).to_have_count(0)
        expect(talker.page.locator(".divider")).to_contain_text("A new dialogue")
    assert len(server.connections) == 2


def test_a_server_that_is_gone(at):
    with Scripted([SPOKEN]) as server, at(server, faults="ERR_CONNECTION|WebSocket") as talker:
        talker.hold()
        talker.ended()
        server.stop()
        expect(talker.notice).to_contain_text("The server has ended the dialogue")
        for _ in range(2):
            talker.talk.click()
            expect(talker.notice).to_contain_text("The server cannot be reached")
            talker.is_said("ready")
            talker.notice.get_by_role("button", name="Close").click()
        expect(talker.page.locator(".divider")).to_have_count(1)


def test_a_reply_that_fails_and_errors_of_the_server(at):
    failing = [SPOKEN[0], SPOKEN[1], ("fail", "the device is out of memory")]
    error = {"type": "error", "error": {"message": "all slots are taken", "code": "queue_full"}}
    with Scripted([failing, [("event", error), SPOKEN[1]]]) as server, at(server) as talker:
        talker.hold()
        expect(talker.ended().locator(".figures")).to_contain_text("The reply failed: the device is out of memory")
        assert np.array_equal(talker.played(), SPOKEN[1][1])
        talker.hold()
        expect(talker.notice).to_contain_text("all slots are taken")
        talker.accessible()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (HTTPStatus.UNAUTHORIZED, '{"error": {"message": "no key"}}', "This server asks for an API key"),
        (HTTPStatus.SERVICE_UNAVAILABLE, '{"error": {"message": "starting"}}', "It says: starting"),
    ],
)
def test_a_server_that_refuses(at, status, body, words):
    def refuse(request):
        return response(status, "application/json", body) if request.path.startswith("/v1/") else None

    with Scripted([SPOKEN], refuse=refuse) as server, at(server, faults="WebSocket|Failed to load") as talker:
        expect(talker.notice).to_contain_text(words)
        talker.talk.click()
        expect(talker.notice).to_contain_text(words)
        talker.is_said("ready")
        if status == HTTPStatus.UNAUTHORIZED:
            talker.notice.get_by_role("button", name="Open the settings").click()
            expect(talker.page.locator("#key")).to_be_focused()
            talker.accessible()
            talker.shot("settings")


def test_settings_reach_the_server(at):
    with Scripted([SPOKEN]) as server, at(server) as talker:
        talker.hold()
        talker.ended()
        talker.settings(temperature="0.7", seed="11", silence="800")
        talker.hold()
        talker.ended(1)
        talker.page.locator("#settings-open").click()
        talker.page.locator("#seed").fill("12")
        talker.page.locator("#settings").get_by_role("button", name="Close").click()
        talker.page.locator("#settings-open").click()
        expect(talker.page.locator("#seed")).to_have_value("11")
        talker.page.locator("#system").fill("Answer in rhyme.")  # opens a dialogue, so there is a new one
        talker.page.locator("#seed").press("Enter")  # saves
        talker.hold()
        talker.ended(2)
        expect(talker.page.locator(".divider")).to_have_count(1)
        talker.page.reload()
        talker.settings(temperature="")
        talker.hold()
        talker.ended()
    said = [(e["session"].get("temperature"), e["session"].get("seed"), e["session"].get("instructions"))
            for e in server.of("session.update")]  # fmt: skip
    assert said == [(None, None, None), (0.7, 11, None), (0.7, 11, "Answer in rhyme."), (None, 11, "Answer in rhyme.")]
    assert len(server.connections) == 3


def test_a_browser_that_keeps_nothing_for_the_page(at):
    refuse = """for (const name of ["localStorage", "sessionStorage"]) Object.defineProperty(window, name, {
        get() { throw new DOMException("Access is denied for this document.", "SecurityError"); } });"""
    with Scripted([SPOKEN]) as server, at(server) as talker:
        talker.page.add_init_script(refuse)
        talker.page.reload()
        talker.settings(seed="11")
        talker.page.locator("#language").click()
        expect(talker.status).to_have_text("按住按钮说话")
        talker.hold()
        talker.ended()
    assert server.events[0]["session"]["seed"] == 11


def test_a_new_dialogue_forgets_the_old_one(at):
    with Scripted([SPOKEN]) as server, at(server) as talker:
        talker.hold()
        talker.ended()
        talker.page.get_by_role("button", name="New dialogue").click()
        expect(talker.page.locator("#log > *")).to_have_count(0)
        expect(talker.page.get_by_text("Say something")).to_be_visible()
        talker.hold()
        talker.ended()
        expect(talker.page.locator(".divider")).to_have_count(0)
    assert len(server.connections) == 2


def test_chinese_on_a_phone_at_night(at):
    phone = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
    script = [("text", "天空看起来是蓝色的。"), ("audio", speech(0.5))]
    with Scripted([script]) as server, at(server, locale="zh-CN", color_scheme="dark", **phone) as talker:
        page = talker.page
        expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
        expect(page).to_have_title("与 Covo 对话")
        talker.talk.tap()
        talker.is_said("latched")
        page.wait_for_timeout(500)
        talker.shot("phone")
        talker.talk.tap()
        reply = talker.ended()
        expect(reply.locator(".words")).to_have_attribute("lang", "zh")
        expect(reply.locator(".figures")).to_contain_text("毫秒后出声")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        small = """() => [...document.querySelectorAll("button, a, label.side, .modes label")].filter((node) => {
            const { width, height } = node.getBoundingClientRect();
            return width && !node.matches(".skip") && Math.min(width, height) < 36; }).map((node) => node.outerHTML)"""
        assert page.evaluate(small) == []
        talker.accessible()
        page.locator("#language").tap()
        expect(page.locator("html")).to_have_attribute("lang", "en")
        expect(reply.locator(".figures")).to_contain_text("heard after")
        expect(talker.status).to_have_text("Hold the button, and talk")
        page.reload()
        expect(page.locator("html")).to_have_attribute("lang", "en")  # it was chosen


ROLES = """
- link "Go to the talk button"
- banner:
  - heading "Covo" [level=1]
  - paragraph: covo-audio-chat
  - button "New dialogue" [disabled]
  - button "Settings"
  - button "中文"
- main:
  - region "Dialogue":
    - heading "Dialogue" [level=2]
    - heading "Say something" [level=3]
    - log "Dialogue"
  - region "How to talk":
    - alert
    - status: Hold the button, and talk
    - button "Audio file"
    - button "Hold to talk, or tap to start and tap again to send"
    - button "Stop" [disabled]
    - meter "Sound level"
    - group "How to talk":
      - radio "Press and talk" [checked]
      - radio "Hands-free"
"""
ROLES_ZH = """
- link "跳到说话按钮"
- banner:
  - button "新对话" [disabled]
  - button "设置"
  - button "EN"
- main:
  - region "对话":
    - log "对话"
  - region "说话方式":
    - status: 按住按钮说话
    - button "音频文件"
    - button "按住说话，或轻点开始、再点发送"
    - button "停止" [disabled]
    - meter "音量"
    - group "说话方式":
      - radio "按住说话" [checked]
      - radio "免提"
"""
FOCUSED = """() => {
  const node = document.activeElement;
  const shown = getComputedStyle(node.matches("input") ? node.parentElement : node); // inputs lie under their labels
  return [node.id || node.value || node.className, shown.outlineStyle]; }"""


def test_what_a_screen_reader_and_the_tab_key_find(at):
    with Scripted([SPOKEN]) as server, at(server, tap=False) as talker:
        body = talker.page.locator("body")
        expect(body).to_match_aria_snapshot(ROLES)
        found = []
        for _ in range(8):
            talker.page.keyboard.press("Tab")
            found.append(tuple(talker.page.evaluate(FOCUSED)))
        order = ("skip", "settings-open", "language", "scroll", "upload", "talk", "press")
        assert found[:7] == [(name, "solid") for name in order]  # and one sees where one is
        talker.page.locator("#language").click()
        expect(body).to_match_aria_snapshot(ROLES_ZH)
        talker.page.keyboard.press("Escape")
        talker.page.locator(".skip").focus()
        talker.page.keyboard.press("Enter")
        talker.page.keyboard.press("Tab")
        assert talker.page.evaluate(FOCUSED)[0] == "press"  # from the button, where the link leads


def test_nothing_moves_where_that_is_not_wanted(at):
    with Scripted([[("wait", 1), *SPOKEN]]) as server, at(server, reduced_motion="reduce") as talker:
        talker.hold()
        talker.is_said("thinking")
        assert talker.page.evaluate("document.getAnimations().length") == 0
        expect(talker.page.locator("#level")).to_have_attribute("aria-valuenow", re.compile(r"\d+"))
        talker.ended()


def test_the_microphone_is_given_back_when_nobody_looks(at):
    live = "window.tracks.filter((track) => track.readyState === 'live').length"
    hide = """() => { Object.defineProperty(document, "hidden", { value: true, configurable: true });
        document.dispatchEvent(new Event("visibilitychange")); }"""
    with Scripted([SPOKEN]) as server, at(server) as talker:
        talker.page.evaluate(WATCH)
        talker.settings(clean="off")
        talker.hold()
        talker.ended()
        assert talker.page.evaluate(live) == 1
        talker.page.evaluate(hide)
        assert talker.page.evaluate(live) == 0
        talker.hold()
        talker.ended(1)
        assert talker.page.evaluate("window.tracks.length") == 2
        # Nothing of what the first one heard is in it.
        assert is_of(talker.saved(talker.questions.nth(1)), *talker.microphone())
        talker.talk.click()
        talker.is_said("latched")
        talker.page.wait_for_timeout(300)
        talker.settings(clean="on")  # while it listens
        talker.talk.click()
        talker.ended(2)
        talker.hold()
        talker.ended(3)
        cleaned = talker.page.evaluate("window.tracks.map((track) => track.getSettings().echoCancellation)")
        assert cleaned == [False, False, True]
