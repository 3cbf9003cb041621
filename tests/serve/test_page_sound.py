"""The page's own arithmetic, run in the browser: resampling, the queue of the loudspeaker, files, base64, words."""

import base64
import io
import re

import numpy as np
import pytest
import soundfile
import torch
from serve.browser import opened
from serve.scripted import RATE, Scripted

from covo_npu.runtime.resampling import resample


@pytest.fixture(scope="module")
def run(chromium):
    """A function: (body of a JavaScript function of `given` that may import the page's files, given) => its value."""
    with Scripted([[]]) as server, opened(chromium, server.url) as talker:
        yield lambda body, given=None: talker.page.evaluate(f"async (given) => {{ {body} }}", given)


@pytest.mark.parametrize("rate", [48_000, 44_100, 16_000, 24_000, 96_000])
def test_the_microphone_is_resampled_as_files_are(run, rate):
    rng = np.random.default_rng(rate)
    signal = rng.uniform(-1, 1, rate // 4).astype(np.float32)
    found = run(
        """const { Resampler } = await import("/resample.js");
        const resampler = new Resampler(given.rate, 24000);
        const out = [];
        for (let at = 0; at < given.signal.length; at += 128)  // as worklets get it
          out.push(...resampler.push(Float32Array.from(given.signal.slice(at, at + 128))));
        return out;""",
        {"rate": rate, "signal": signal.tolist()},
    )
    whole = resample(torch.from_numpy(signal), rate, RATE, torch.float64).numpy()
    assert whole.size - 30 <= len(found) <= whole.size  # the last few wait for what follows
    # Sums of double precision here, of at most 48 float32 products there.
    assert np.abs(np.array(found) - whole[: len(found)]).max() < 48 * 1.6 * 2.0**-24


QUEUE = """const { Queue } = await import("/queue.js");
  const reports = [];
  const queue = new Queue((report) => reports.push(report));
  const heard = [];
  const pull = (quanta) => {
    for (let i = 0; i < quanta; i++) {
      const out = new Float32Array(128).fill(9);
      queue.pull(out);
      heard.push(...out);
    }
  };
  queue.take({ start: "a" });
"""


def test_the_queue_plays_what_it_was_given_however_it_was_cut(run):
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 3000, 40).tolist()
    heard, reports = run(
        QUEUE
        + """let next = 1;
        for (const size of given) queue.take({ samples: Float32Array.from({ length: size }, () => next++) });
        queue.take({ end: true });
        pull(Math.ceil(next / 128) + 2);
        return [heard, reports];""",
        sizes,
    )
    assert heard[: sum(sizes)] == list(range(1, sum(sizes) + 1)) and set(heard[sum(sizes) :]) == {0}
    types = [report["type"] for report in reports]
    assert types[0] == "started" and types[-1] == "finished" and set(types[1:-1]) == {"played"}
    assert reports[-1]["played"] == sum(sizes) and reports[-1]["gaps"] == 0


def test_the_queue_begins_with_a_reserve_and_doubles_it_after_a_gap(run):
    heard, reports = run(
        QUEUE
        + """const push = (size) => queue.take({ samples: new Float32Array(size).fill(1) });
        push(4799); pull(2);          // 200 ms are 4800 samples
        push(1); pull(38);            // all of it: 37.5 quanta
        push(9599); pull(1);          // now 400 ms are wanted
        push(1); pull(1);
        queue.take({ end: true }); pull(80);
        return [heard, reports];"""
    )
    runs = re.findall("0+|1+", "".join(str(round(sample)) for sample in heard))
    assert [(text[0], len(text)) for text in runs] == [
        ("0", 256), ("1", 4800), ("0", 64 + 128), ("1", 9600), ("0", len(heard) - 256 - 4800 - 192 - 9600),
    ]  # fmt: skip
    assert reports[-1] == {"type": "finished", "id": "a", "played": 14400, "gaps": 1, "level": 1}


def test_a_stopped_queue_is_silent_and_says_how_far_it_came(run):
    heard, reports = run(
        QUEUE
        + """queue.take({ samples: new Float32Array(24000).fill(1) });
        pull(100);
        queue.take({ stop: true });
        pull(10);
        queue.take({ samples: new Float32Array(24000).fill(1) });  // what still arrives of it
        pull(10);
        return [heard, reports];"""
    )
    assert sum(heard) == 12_800
    assert (reports[-1]["type"], reports[-1]["id"], reports[-1]["played"]) == ("stopped", "a", 12_800)


def test_files_and_base64_hold_the_samples(run):
    samples = np.random.default_rng(1).integers(-32768, 32768, 20_001).astype("<i2")
    file, text, back = run(
        """const { wav, toBase64, fromBase64 } = await import("/sound.js");
        const samples = Int16Array.from(given);
        const file = [...new Uint8Array(await wav(samples).arrayBuffer())];
        return [file, toBase64(samples), [...fromBase64(toBase64(samples))]];""",
        samples.tolist(),
    )
    assert base64.b64decode(text) == samples.tobytes() and np.array_equal(back, samples)
    found, rate = soundfile.read(io.BytesIO(bytes(file)), dtype="int16")
    assert rate == RATE and np.array_equal(found, samples)


def test_both_languages_say_the_same_things(run):
    tables = run("return (await import('/strings.js')).LANGUAGES")
    english, chinese = tables["en"], tables["zh-CN"]
    assert english.keys() == chinese.keys()
    for name, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[name])), name
        assert text == chinese[name] or re.search("[\u4e00-\u9fff]", chinese[name]) or name == "otherLanguage", name


# The page's dialogue with a loudspeaker and a server that do nothing by themselves: `server` tells an event.
DIALOGUE = """const { Dialogue } = await import("/dialogue.js");
    const { RATE, toBase64 } = await import("/sound.js");
    const plugged = window.WebSocket;
    let socket;
    window.WebSocket = class {
      constructor() { socket = this; this.sent = []; }
      send(text) { this.sent.push(JSON.parse(text)); }
      close() {}
    };
    const done = [];
    const speaker = {
      latency: 0,
      start(id) { done.push("start " + id); },
      push(samples) { done.push("push " + samples.length); },
      end() { done.push("end"); },
      async stop() { return { id: null, played: 0, gaps: 0 }; },
    };
    const on = { changed() {}, asked() {}, replying() {}, updated() {}, problem() {}, restarted() {} };
    const settings = {
      key: "", system: "", voice: "", voices: [], temperature: "", seed: "", silence: "500", speaks: true,
    };
    const dialogue = new Dialogue(speaker, settings, on);
    dialogue.connect(given.handsFree);
    await 0; await 0;
    window.WebSocket = plugged;
    socket.onopen();
    const server = (event) => socket.onmessage({ data: JSON.stringify(event) });
    const replies = (id) => {
      server({ type: "response.created", response: { id } });
      const delta = toBase64(new Int16Array(1200));
      server({ type: "response.output_audio.delta", response_id: id, item_id: "of " + id, delta });
    };
    const asks = async () => { dialogue.append(new Int16Array(RATE)); await dialogue.ask(); };
"""


def test_a_reply_that_was_given_up_before_it_began_is_not_heard(run):
    """The server had begun it when the cancel came; the next one is heard."""
    script = """await asks();
        await dialogue.interrupt();
        replies("first");
        server({ type: "response.done", response: { id: "first", status: "cancelled", status_details: {} } });
        const unheard = done.length;
        await asks();
        replies("second");
        return [unheard, done];"""
    assert run(DIALOGUE + script, {"handsFree": False}) == [0, ["start of second", "push 1200"]]


def test_a_turn_that_the_server_drops_is_none_of_the_page_either(run):
    script = """dialogue.append(new Int16Array(RATE));
        server({ type: "input_audio_buffer.speech_started", audio_start_ms: 500 });
        const hearing = dialogue.heard !== null;
        server({ type: "input_audio_buffer.cleared" });
        return [hearing, dialogue.heard, dialogue.frames.length];"""
    assert run(DIALOGUE + script, {"handsFree": True}) == [True, None, 0]
