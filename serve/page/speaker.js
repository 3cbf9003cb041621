// The loudspeaker: one sound at a time, without gaps between its pieces.

import { Queue } from "./queue.js";
import { RATE, addWorklet, toFloat } from "./sound.js";

const SILENCE = { id: null, played: 0, gaps: 0 };
const STOP_TIMEOUT_MS = 300; // a suspended context does not answer

export class Speaker {
  /** onReport: called with the reports of queue.js. */
  constructor(onReport) {
    this.onReport = onReport;
    this.context = null;
    this.last = SILENCE;
    this.halting = null;
  }

  /** Ready to play. To be called from a press or a click: browsers play nothing before one. */
  async open() {
    this.opening ??= this.build();
    if (this.context.state !== "running") this.context.resume();
    try {
      await this.opening;
    } catch (error) {
      this.context.close();
      this.opening = null; // the next press tries again
      throw error;
    }
  }

  async build() {
    // At the replies' own rate, so that samples are played as they are.
    this.context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    if (this.context.audioWorklet) {
      await addWorklet(this.context, "playback.js");
      const node = new AudioWorkletNode(this.context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
      node.port.onmessage = ({ data }) => this.report(data);
      this.send = (message) => node.port.postMessage(message, message.samples ? [message.samples.buffer] : []);
      this.node = node;
    } else {
      // Without https there are no worklets; the older node plays on the page's own thread.
      const queue = new Queue((report) => this.report(report));
      this.node = this.context.createScriptProcessor(2048, 0, 1);
      this.node.onaudioprocess = ({ outputBuffer }) => queue.pull(outputBuffer.getChannelData(0));
      this.send = (message) => queue.take(message);
    }
    this.node.connect(this.context.destination);
  }

  /** Seconds between a report and the moment when the sound is heard. */
  get latency() {
    return this.context?.outputLatency || 0;
  }

  /** Begin a sound; what was played before ends. */
  start(id) {
    this.last = { id, played: 0, gaps: 0 };
    this.send({ start: id });
  }

  /** More samples, an Int16Array, of the sound that was begun. */
  push(samples) {
    this.send({ samples: toFloat(samples) });
  }

  /** The sound is complete: it finishes when all of it was played. */
  end() {
    this.send({ end: true });
  }

  /** End the sound now. Returns its last report, {id, played, gaps}; id is null if nothing was playing. */
  stop() {
    if (this.last.id === null) return Promise.resolve(this.last);
    this.halting ??= new Promise((resolve) => {
      this.stopped = resolve;
      setTimeout(() => resolve(this.last), STOP_TIMEOUT_MS);
      this.send({ stop: true });
    }).then((report) => {
      this.halting = null;
      if (this.last.id === report.id) this.last = SILENCE;
      return report;
    });
    return this.halting;
  }

  report(report) {
    if (report.type === "stopped") this.stopped(report);
    else if (report.id !== this.last.id) return; // of a sound that is over
    else this.last = report.type === "finished" ? SILENCE : report;
    this.onReport(report);
  }
}
