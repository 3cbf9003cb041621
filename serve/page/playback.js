// Worklet: plays the queue, and reports how much of it was played.

import { Queue } from "./queue.js";

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = new Queue((report) => this.port.postMessage(report));
    this.port.onmessage = ({ data }) => this.queue.take(data);
  }

  process(inputs, [[out]]) {
    this.queue.pull(out);
    return true;
  }
}

registerProcessor("playback", Playback);
