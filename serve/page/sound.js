// Samples in other forms. Everywhere on the page they are Int16, mono, 24 kHz.

export const RATE = 24000;

/** Samples as floats in [-1, 1). */
export function toFloat(samples) {
  return Float32Array.from(samples, (sample) => sample / 32768);
}

/** Bytes of samples in base64, little-endian as every browser's machine. */
export function toBase64(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

/** Samples of base64 text. */
export function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Int16Array(bytes.buffer, 0, bytes.length >> 1);
}

/** Load a worklet of the page. Throws a NetworkError if the server does not give it. */
export async function addWorklet(context, file) {
  try {
    await context.audioWorklet.addModule(new URL(file, import.meta.url));
  } catch (error) {
    throw new DOMException(error.message, "NetworkError"); // browsers call it an AbortError
  }
}

/** One array of many. */
export function joined(pieces) {
  const all = new Int16Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    all.set(piece, at);
    at += piece.length;
  }
  return all;
}

/** A WAV file, a Blob. */
export function wav(samples) {
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + samples.byteLength, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true); // bytes of the format
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // mono
  header.setUint32(24, RATE, true);
  header.setUint32(28, 2 * RATE, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, samples.byteLength, true);
  return new Blob([header, samples], { type: "audio/wav" });
}

/** The samples of an audio file that the browser can decode. Throws if it cannot. */
export async function decoded(file) {
  const context = new OfflineAudioContext(1, 1, RATE); // its rate is the one that the file is brought to
  const buffer = await context.decodeAudioData(await file.arrayBuffer());
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
  return Int16Array.from(channels[0], (_, i) => {
    const mean = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    return Math.max(-32768, Math.min(32767, Math.round(mean * 32768)));
  });
}
