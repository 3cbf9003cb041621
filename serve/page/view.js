// What is seen of a dialogue: one card for each question and each reply, with its words, its sound and its figures.

import { RATE, joined, wav } from "./sound.js";

const BAR_PX = 3;
const GAP_PX = 2;

/** An element. properties: of the element; children: elements and texts. */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A card of the log. play: called with the card when its button is pressed. */
class Card {
  constructor(log, kind, number, play) {
    this.kind = kind;
    this.number = number;
    this.sound = `replay ${number}`; // its name at the speaker
    this.playing = false;
    this.heardSamples = 0;
    this.who = element("h3", { className: "who" });
    this.canvas = element("canvas");
    this.canvas.setAttribute("role", "img");
    this.button = element("button", { type: "button", className: "quiet", onclick: () => play(this) }, icon("play"));
    this.time = element("span", { className: "time" });
    this.download = element("a", { className: "quiet button", hidden: true }, icon("download"));
    this.strip = element("div", { className: "strip", hidden: true }, this.button, this.canvas, this.time, this.download);
    this.root = element("article", { className: `turn ${kind}` }, this.who, this.strip);
    log.append(this.root);
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.canvas);
  }

  get samples() {
    return joined(this.chunks);
  }

  get length() {
    return this.chunks.reduce((sum, chunk) => sum + chunk.length, 0);
  }

  /** Show all of it again, in the words of say. */
  show(say, format) {
    const seconds = format(this.length / RATE, 1);
    this.who.textContent = say(this.kind);
    this.strip.hidden = !this.length;
    this.time.textContent = say("seconds", { n: seconds });
    this.canvas.ariaLabel = say("soundOf", { who: say(this.kind), seconds });
    const action = this.playing ? "playStop" : "play";
    this.button.replaceChildren(icon(this.playing ? "stop" : "play"));
    this.button.ariaLabel = this.button.title = `${say(action)}: ${say(this.kind)} ${this.number}`;
    this.download.ariaLabel = this.download.title = `${say("download")}: ${say(this.kind)} ${this.number}`;
    this.draw();
  }

  /** The sound is complete: it may be downloaded. */
  complete() {
    if (!this.length || !this.download.hidden) return;
    this.download.href = URL.createObjectURL(wav(this.samples));
    this.download.download = `covo-${this.number}-${this.kind}.wav`;
    this.download.hidden = false;
  }

  /** Bars of the sound's peaks; what was heard is dark. */
  draw() {
    const { canvas } = this;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (!width || !this.length) return;
    const ratio = window.devicePixelRatio;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = getComputedStyle(canvas).color;
    const count = Math.floor(width / (BAR_PX + GAP_PX));
    peaks(this.chunks, this.length, count).forEach((peak, i) => {
      const tall = Math.max(2, peak * height);
      context.globalAlpha = (i + 0.5) / count < this.heardSamples / this.length ? 1 : 0.35;
      context.fillRect(i * (BAR_PX + GAP_PX), (height - tall) / 2, BAR_PX, tall);
    });
  }

  remove() {
    this.resized.disconnect();
    if (this.download.href) URL.revokeObjectURL(this.download.href);
    this.root.remove();
  }
}

export class QuestionCard extends Card {
  constructor(log, number, samples, play) {
    super(log, "you", number, play);
    this.chunks = [samples];
    this.complete();
  }
}

export class ReplyCard extends Card {
  constructor(log, number, reply, play) {
    super(log, "covo", number, play);
    this.reply = reply;
    this.words = element("p", { className: "words" });
    this.figures = element("p", { className: "figures" });
    this.who.after(this.words);
    this.root.append(this.figures);
  }

  get chunks() {
    return this.reply.chunks;
  }

  get length() {
    return this.reply.samples;
  }

  show(say, format) {
    const { reply } = this;
    if (!this.playing || reply.playing) this.heardSamples = reply.heardSamples; // else it is played again
    this.words.textContent = reply.text;
    this.words.lang = /[\u3400-\u9fff]/.test(reply.text) ? "zh" : "";
    this.root.classList.toggle("waiting", !reply.done && !reply.text);
    this.root.ariaBusy = String(!reply.done); // read aloud once, when it is complete
    if (reply.done) this.complete();
    this.figures.replaceChildren(...figures(reply, say, format));
    super.show(say, format);
  }
}

/** What was measured of a reply, and how it ended, as elements. */
function figures(reply, say, format) {
  const found = [];
  const tell = (text, why) => found.push(element("span", { textContent: text, title: why ? say(why) : "" }));
  if (reply.firstMs !== null) tell(say("firstHeard", { ms: format(reply.firstMs, 0) }), "firstHeardWhy");
  if (reply.done && reply.samples)
    tell(say("rtf", { rtf: format((reply.arrivedMs * RATE) / reply.samples / 1000, 2) }), "rtfWhy");
  if (reply.gaps) tell(reply.gaps === 1 ? say("gap") : say("gaps", { n: reply.gaps }), "gapsWhy");
  if (reply.muted && reply.started && (reply.status === "cancelled" || reply.heardSamples < reply.samples))
    tell(say("interrupted", { n: format(reply.heardSamples / RATE, 1) }));
  else if (reply.status === "cancelled") tell(say("stopped"));
  if (reply.status === "incomplete") tell(say("cut"));
  if (reply.status === "lost") tell(say("lostTitle"));
  if (reply.status === "failed") tell(say("failed", { message: reply.message }));
  return found;
}

/** The largest magnitudes, 0 to 1, of so many equal parts of a sound. */
function peaks(chunks, length, count) {
  const found = new Array(count).fill(0);
  let at = 0;
  for (const chunk of chunks)
    for (let i = 0; i < chunk.length; i += 4, at += 4) {
      const part = Math.min(count - 1, Math.floor((at * count) / length));
      const magnitude = Math.abs(chunk[i]) / 32768;
      if (magnitude > found[part]) found[part] = magnitude;
    }
  const loudest = Math.max(0.05, ...found);
  return found.map((peak) => peak / loudest);
}

/** The level of what is heard now, as bars that move outwards from the middle of a canvas. */
export class Bars {
  constructor(canvas, meter) {
    this.canvas = canvas;
    this.meter = meter;
    this.levels = [];
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
  }

  /** One more level: the root mean square of 40 to 50 ms of sound. */
  add(rms) {
    const level = Math.max(0, Math.min(1, 1 + Math.log10(Math.max(rms, 1e-5)) / 2.5)); // -50 dB is nothing
    this.levels = this.still.matches ? new Array(200).fill(level) : [level, ...this.levels].slice(0, 200);
    const percent = String(Math.round(100 * level));
    if (this.meter.ariaValueNow !== percent) this.meter.ariaValueNow = percent;
    this.draw();
  }

  clear() {
    this.levels = [];
    this.meter.ariaValueNow = "0";
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    const ratio = window.devicePixelRatio;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = getComputedStyle(canvas).color;
    const count = Math.floor(width / 2 / (BAR_PX + GAP_PX));
    this.levels.slice(0, count).forEach((level, i) => {
      const tall = Math.max(2, level * height * 0.8);
      context.globalAlpha = 0.7 * (1 - i / count);
      for (const side of [-1, 1])
        context.fillRect(width / 2 + side * (i + 0.5) * (BAR_PX + GAP_PX) - BAR_PX / 2, (height - tall) / 2, BAR_PX, tall);
    });
  }
}
