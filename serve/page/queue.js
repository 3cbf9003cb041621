// What is to be played: samples in a queue, taken out at the pace of the loudspeaker. The playback worklet imports it,
// and speaker.js where there are no worklets. It holds a whole reply, for replies arrive faster than they are heard.

const RATE = 24000;
const PREBUFFER_SAMPLES = 0.2 * RATE; // before the first sound; doubled after each gap
const MAX_PREBUFFER_SAMPLES = 3.2 * RATE;
const REPORT_SAMPLES = 0.05 * RATE;

export class Queue {
  /** tell: called with {type, id, played, gaps, level}; type: started, played, finished or stopped. */
  constructor(tell) {
    this.tell = tell;
    this.begin(null);
  }

  /** Take a message of the page: {start: id}, {samples: Float32Array}, {end: true} or {stop: true}. */
  take({ start, samples, end, stop }) {
    if (start !== undefined) this.begin(start);
    if (stop) {
      this.say("stopped");
      this.begin(null);
    }
    if (this.id === null) return; // more of a sound that was stopped
    if (samples) {
      this.chunks.push(samples);
      this.queued += samples.length;
    }
    if (end) this.ended = true;
  }

  begin(id) {
    this.id = id;
    this.chunks = [];
    this.offset = 0; // into the first chunk
    this.queued = 0;
    this.played = 0;
    this.reported = 0;
    this.gaps = 0;
    this.ended = false;
    this.waiting = true; // for the prebuffer
    this.prebuffer = PREBUFFER_SAMPLES;
    this.power = 0; // of what was played since the last report
  }

  /** Fill out, a Float32Array, with the next samples, and with silence where there are none. */
  pull(out) {
    let filled = 0;
    if (this.waiting && (this.queued >= this.prebuffer || this.ended)) {
      this.waiting = false;
      if (!this.played) this.say("started");
    }
    while (!this.waiting && filled < out.length && this.queued) {
      const chunk = this.chunks[0];
      const taken = chunk.subarray(this.offset, this.offset + out.length - filled);
      out.set(taken, filled);
      filled += taken.length;
      this.offset += taken.length;
      this.queued -= taken.length;
      if (this.offset === chunk.length) {
        this.chunks.shift();
        this.offset = 0;
      }
    }
    for (let i = 0; i < filled; i++) this.power += out[i] * out[i];
    out.fill(0, filled);
    this.played += filled;
    if (this.id === null || this.waiting) return;
    if (this.ended && !this.queued) {
      this.say("finished");
      this.begin(null);
    } else if (filled < out.length) {
      this.gaps += 1;
      this.waiting = true;
      this.prebuffer = Math.min(2 * this.prebuffer, MAX_PREBUFFER_SAMPLES);
    } else if (this.played - this.reported >= REPORT_SAMPLES) {
      this.say("played");
    }
  }

  say(type) {
    const level = Math.sqrt(this.power / Math.max(1, this.played - this.reported));
    this.reported = this.played;
    this.power = 0;
    this.tell({ type, id: this.id, played: this.played, gaps: this.gaps, level });
  }
}
