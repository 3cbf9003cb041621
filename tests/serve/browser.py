"""A Chromium with a recording as its microphone, and pages whose sound is tapped on its way to the loudspeaker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, BrowserType, Locator, Page, WebSocket, expect
from serve.scripted import RATE

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build/page"
TIMEOUT_MS = 15_000
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required")  # fmt: skip
INSECURE = "elsewhere.test"  # a name of this machine that browsers do not take for it

# Everything that goes to a loudspeaker goes through a worklet, too, which keeps it.
TAP = """
window.tapped = [];
const worklet = `registerProcessor("tap", class extends AudioWorkletProcessor {
  process([[samples]]) {
    if (samples && samples.some((sample) => sample !== 0)) this.port.postMessage(samples.slice());
    return true;
  }
});`;
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (target, ...rest) {
  if (target === this.context.destination && this.context.audioWorklet) {
    const url = URL.createObjectURL(new Blob([worklet], { type: "text/javascript" }));
    this.context.audioWorklet.addModule(url).then(() => {
      const tap = new AudioWorkletNode(this.context, "tap", { numberOfOutputs: 0 });
      tap.port.onmessage = ({ data }) => window.tapped.push(...data);
      connect.call(this, tap);
    });
  }
  return connect.call(this, target, ...rest);
};
const create = BaseAudioContext.prototype.createScriptProcessor;
BaseAudioContext.prototype.createScriptProcessor = function (...given) {
  const node = create.apply(this, given);
  Object.defineProperty(node, "onaudioprocess", {
    set: (handler) =>
      node.addEventListener("audioprocess", (event) => {
        handler(event);
        window.tapped.push(...event.outputBuffer.getChannelData(0));
      }),
  });
  return node;
};
"""

# What the page's worklet of the microphone is given, a second one of the same scope keeps: from the first sample,
# whenever a busy browser connects the two. Pages that browsers do not trust have neither.
EAR = """
const ear = URL.createObjectURL(new Blob([`
const given = [];
const register = registerProcessor;
const overheard = (Kind) => class extends Kind {
  process(inputs, ...rest) {
    if (inputs[0].length) given.push(inputs[0][0].slice());
    return super.process(inputs, ...rest);
  }
};
globalThis.registerProcessor = (name, Kind) => register(name, name === "capture" ? overheard(Kind) : Kind);
register("ear", class extends AudioWorkletProcessor {
  process() {
    for (const samples of given.splice(0)) this.port.postMessage(samples);
    return true;
  }
});`], { type: "text/javascript" }));
const addModule = window.AudioWorklet?.prototype.addModule;
if (addModule)
  AudioWorklet.prototype.addModule = async function (...given) {
    await addModule.call(this, ear);
    return addModule.apply(this, given);
  };
const plug = MediaStreamAudioSourceNode.prototype.connect;
MediaStreamAudioSourceNode.prototype.connect = function (...given) {
  const node = new AudioWorkletNode(this.context, "ear", { numberOfOutputs: 0 });
  window.ear = { rate: this.context.sampleRate, samples: [] };
  node.port.onmessage = ({ data }) => window.ear.samples.push(...data);
  return plug.apply(this, given);
};
"""


def launch(kind: BrowserType, *flags: str) -> Browser:
    """A Chromium of this machine. Without one the test is skipped; in CI, where .ci/run installs it, it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"the page is not tested: none of {', '.join(NAMES)} is on the PATH; apt-get install chromium")
    resolve = f"--host-resolver-rules=MAP {INSECURE} 127.0.0.1"
    return kind.launch(executable_path=found, args=[*QUIET, resolve, *flags])


@contextlib.contextmanager
def ahead_of_others() -> Iterator[None]:
    """What is started inside gets processor time first, where that is allowed: a browser skips sound that is late."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def microphone(wav: Path) -> tuple[str, ...]:
    """Flags of a Chromium whose microphone plays a file, over and over, to every page that asks."""
    fake = f"--use-file-for-fake-audio-capture={wav}"
    return "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", fake


class Talker:
    """A page that is open, and what a user does and sees there."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.sent: list[dict[str, Any]] = []  # events of the page, and of the server, over all its WebSockets
        self.received: list[dict[str, Any]] = []
        self.talk = page.locator("#talk")
        self.status = page.locator("#status")
        self.notice = page.locator(".notice")
        self.replies = page.locator(".turn.covo")
        self.questions = page.locator(".turn.you")
        self.stop = page.locator("#stop")
        page.on("websocket", self._listen)

    def _listen(self, socket: WebSocket) -> None:
        socket.on("framesent", lambda text: self.sent.append(json.loads(text)))
        socket.on("framereceived", lambda text: self.received.append(json.loads(text)))

    def is_said(self, words: str) -> None:
        """Wait until the status line has the words of this name. By frames: `expect` looks once a second at last."""
        self.page.wait_for_function("(words) => document.getElementById('status').dataset.words === words", arg=words)

    def hold(self, ms: int = 400) -> float:
        """Press, talk so long, and let go. Returns how many seconds the microphone gave the page meanwhile, 0 untapped.

        They are fewer where a busy browser skips some.
        """
        given_s = "window.ear ? window.ear.samples.length / window.ear.rate : 0"
        self.talk.hover()
        self.page.mouse.down()
        self.is_said("recording")
        before_s = self.page.evaluate(given_s)
        self.page.wait_for_timeout(ms)
        after_s = self.page.evaluate(given_s)
        self.page.mouse.up()
        return float(after_s - before_s)

    def ended(self, number: int = 0) -> Locator:
        """The reply of this number, once it is complete and was heard, unless it has no sound."""
        self.page.wait_for_function(
            """(number) => {
                const reply = document.querySelectorAll(".turn.covo")[number];
                return reply?.ariaBusy === "false" && (reply.querySelector(".strip").hidden ||
                    /heard after|毫秒后出声/.test(reply.textContent) &&
                    /^(Play|播放)/.test(reply.querySelector("button").title)); }""",
            arg=number,
        )
        return self.replies.nth(number)

    def microphone(self) -> tuple[np.ndarray, int]:
        """All samples that the page was given of the microphone since it was opened, float32, and their rate."""
        ear = self.page.evaluate("window.ear")
        return np.array(ear["samples"], np.float32), ear["rate"]

    def saved(self, card: Locator) -> np.ndarray:
        """The sound of a question or a reply as its download has it, Int16."""
        with self.page.expect_download() as download:
            card.get_by_role("link", name=re.compile("Download|下载")).click()
        assert download.value.suggested_filename.endswith(".wav")
        samples, rate = soundfile.read(download.value.path(), dtype="int16")
        assert rate == RATE
        return samples

    def upload(self, path: Path) -> None:
        self.page.locator("#upload").set_input_files(path)

    def settings(self, **values: str) -> None:
        """Change settings by the ids of their fields."""
        self.page.locator("#settings-open").click()
        for name, value in values.items():
            field = self.page.locator(f"#{name}")
            if field.get_attribute("type") == "checkbox":
                field.set_checked(value == "on")
            else:
                field.fill(value)
        self.page.get_by_role("button", name=re.compile("Save|保存")).click()

    def played(self) -> np.ndarray:
        """What went to the loudspeaker since forget(), as Int16, without samples that are 0.

        A busy machine may put silence into the middle; where that matters the page counts it as gaps.
        """
        samples = np.array(self.page.evaluate("window.tapped"), np.float64) * 32768
        assert np.array_equal(samples, np.round(samples)), "samples were changed on their way to the loudspeaker"
        return samples[samples != 0].astype(np.int16)

    def forget(self) -> None:
        self.page.evaluate("window.tapped = []")

    def shot(self, name: str) -> None:
        """Keep a picture for people."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")

    def accessible(self) -> None:
        """Nothing that axe knows of is wrong for people who see, hear or move differently."""
        self.page.wait_for_timeout(300)  # contrasts count when what appears has appeared
        found = Axe().run(self.page).response["violations"]
        assert not found, [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]


@contextlib.contextmanager
def opened(
    browser: Browser, url: str, *, mic: bool = True, tap: bool = True, faults: str = "", **context: Any
) -> Iterator[Talker]:
    """A page of a server. In the end it must have loaded nothing from elsewhere, and met no fault.

    tap: keep what is played and heard, for which the page's policy on scripts is lifted; faults: a pattern of what the
    console may say of faults that the test makes.
    """
    options = {"locale": "en-US", "viewport": {"width": 1100, "height": 780}, "bypass_csp": tap, **context}
    made: BrowserContext = browser.new_context(permissions=["microphone"] if mic else [], **options)
    if tap:
        made.add_init_script(TAP)
        made.add_init_script(EAR)
    page = made.new_page()
    talker = Talker(page)
    said: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda line: said.append(line.text) if line.type in ("error", "warning") else None)
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    page.goto(url)
    try:
        yield talker
        unexpected = [line for line in said if not (faults and re.search(faults, line))]
        assert not unexpected, unexpected
        foreign = [address for address in asked if not address.startswith((url, "blob:" + url))]
        assert not foreign, foreign
    finally:
        made.close()


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Loud noise as Int16 without a sample that is 0: what is heard of it can be found again."""
    samples = np.random.default_rng(seed).integers(1, 12_000, int(seconds * RATE))
    return (samples * np.where(np.arange(samples.size) % 2, 1, -1)).astype(np.int16)
