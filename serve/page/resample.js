// One stream of samples from one rate to another. The definition is that of runtime/audio.py: windowed sinc, Hann
// window, 6 zero crossings, roll-off 0.99. The capture worklet imports it.

const ZEROS = 6;
const ROLLOFF = 0.99;

const gcd = (a, b) => (b ? gcd(b, a % b) : a);

export class Resampler {
  /** From one rate to another, both whole numbers of Hz. */
  constructor(from, to) {
    const divisor = gcd(from, to);
    this.up = to / divisor;
    this.down = from / divisor;
    const cutoff = Math.min(this.up, this.down) * ROLLOFF;
    this.reach = Math.ceil((ZEROS * this.down) / cutoff); // input samples to each side
    this.taps = 2 * this.reach + 2;
    this.kernels = Array.from({ length: this.up }, (_, phase) => kernel(phase, this.up, this.down, cutoff, this.reach));
    this.held = new Float32Array(this.reach); // silence before the first sample
    this.begin = -this.reach; // position of held[0] in the stream
    this.next = 0; // number of the next output
  }

  /** The outputs that more samples decide, a Float32Array. */
  push(samples) {
    if (this.up === this.down) return samples;
    const held = new Float32Array(this.held.length + samples.length);
    held.set(this.held);
    held.set(samples, this.held.length);
    const out = [];
    for (; ; this.next++) {
      const start = this.start(this.next);
      const at = start - this.begin;
      if (at + this.taps > held.length) break;
      const weights = this.kernels[this.next % this.up];
      let sum = 0;
      for (let tap = 0; tap < this.taps; tap++) sum += weights[tap] * held[at + tap];
      out.push(sum);
    }
    const drop = Math.min(this.start(this.next) - this.begin, held.length);
    this.held = held.slice(drop);
    this.begin += drop;
    return Float32Array.from(out);
  }

  /** The input sample that the window of output n begins with. */
  start(n) {
    return Math.floor((n * this.down) / this.up) - this.reach;
  }
}

function kernel(phase, up, down, cutoff, reach) {
  const first = Math.floor((phase * down) / up) - reach;
  return Float64Array.from({ length: 2 * reach + 2 }, (_, tap) => {
    const t = Math.max(-ZEROS, Math.min(ZEROS, ((first + tap) / down - phase / up) * cutoff)); // in zero crossings
    const window = Math.cos((Math.PI * t) / ZEROS / 2) ** 2;
    const sinc = t === 0 ? 1 : Math.sin(Math.PI * t) / (Math.PI * t);
    return (sinc * window * cutoff) / down;
  });
}
