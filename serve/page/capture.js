// Worklet: the microphone at the context's own rate becomes frames of 40 ms, 24 kHz, Int16, each with its level.

import { Resampler } from "./resample.js";

const RATE = 24000;
const FRAME_SAMPLES = 960;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.restart();
  }

  restart() {
    this.frame = new Int16Array(FRAME_SAMPLES);
    this.filled = 0;
    this.power = 0;
  }

  process([channels]) {
    if (!channels.length) return true; // the source is not connected yet, or gone
    for (const sample of this.resampler.push(mean(channels))) {
      const clipped = Math.max(-1, Math.min(32767 / 32768, sample));
      this.frame[this.filled++] = Math.round(clipped * 32768);
      this.power += clipped * clipped;
      if (this.filled === FRAME_SAMPLES) this.send();
    }
    return true;
  }

  send() {
    const { frame } = this;
    this.port.postMessage({ frame, rms: Math.sqrt(this.power / FRAME_SAMPLES) }, [frame.buffer]);
    this.restart();
  }
}

function mean(channels) {
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
}

registerProcessor("capture", Capture);
