// The microphone: frames of 40 ms while it is open, or the reason why it cannot be opened.

import { addWorklet } from "./sound.js";

const PROBLEMS = {
  NotAllowedError: "micDenied",
  SecurityError: "micDenied",
  NotFoundError: "micMissing",
  OverconstrainedError: "micMissing",
  NotReadableError: "micBusy",
  AbortError: "micBusy",
  NetworkError: "refused",
};

/** Whether this page may have a microphone at all: browsers want https, or the computer's own address. */
export const secure = () => window.isSecureContext && Boolean(navigator.mediaDevices?.getUserMedia);

export class Microphone {
  /** onFrame: called with (frame: Int16Array of 40 ms, rms); onGone: called when the device is taken away. */
  constructor(onFrame, onGone) {
    this.onFrame = onFrame;
    this.onGone = onGone;
    this.opening = null;
  }

  /** Open it. Returns null, or {kind, message}; kind names the words of strings.js. clean: echo, noise and gain. */
  async open(clean) {
    if (!secure()) return { kind: "micInsecure" };
    this.opening ??= this.build(clean);
    try {
      await this.opening;
      return null;
    } catch (error) {
      this.close();
      return { kind: PROBLEMS[error.name] ?? "micOther", message: `${error.name}: ${error.message}` };
    }
  }

  async build(clean) {
    this.clean = clean;
    const audio = { channelCount: 1, echoCancellation: clean, noiseSuppression: clean, autoGainControl: clean };
    this.stream = await navigator.mediaDevices.getUserMedia({ audio });
    // At the device's own rate: Firefox does not join a microphone to a context of another one.
    this.context = new AudioContext();
    await addWorklet(this.context, "capture.js");
    const node = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data: { frame, rms } }) => this.onFrame(frame, rms);
    this.context.createMediaStreamSource(this.stream).connect(node);
    this.stream.getTracks()[0].onended = () => {
      this.close();
      this.onGone();
    };
    await this.context.resume();
  }

  /** Give the device back; the browser's sign that it is in use goes out. */
  close() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.context?.close();
    this.stream = this.context = this.opening = null;
  }
}
