// The WebSocket to /v1/realtime: events there and back, and why it could not be opened.

import { toBase64 } from "./sound.js";

const [NORMAL, GOING_AWAY] = [1000, 1001]; // RFC 6455: the server meant to close

/** An address of this server. Relative, so that the page may live below a path of a proxy. */
const address = (path) => new URL(path, document.baseURI);

/** The header of a key, in UTF-8: fetch takes a character for each byte. */
function authorization(key) {
  return key ? { Authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}` } : {};
}

export class Connection {
  /** onEvent: called with each event of the server; onLost: called with {kind, reason} once, unless close() was called. */
  constructor(onEvent, onLost) {
    this.onEvent = onEvent;
    this.onLost = onLost;
    this.outbox = []; // until the socket is open
    this.open = false;
    this.closed = false;
    this.count = 0;
  }

  /** Connect with this key, which may be empty. What is sent meanwhile goes out when the socket opens. */
  async connect(key) {
    const protocols = ["realtime"];
    if (key) {
      const secret = await this.secret(key);
      if (!secret) return;
      protocols.push(`openai-insecure-api-key.${secret}`); // the only header that a page can set
    }
    if (this.closed) return;
    const url = address("v1/realtime");
    url.protocol = url.protocol.replace("http", "ws");
    this.socket = new WebSocket(url, protocols);
    this.socket.onopen = () => {
      this.open = true;
      this.outbox.forEach((text) => this.socket.send(text));
      this.outbox = [];
    };
    this.socket.onmessage = ({ data }) => this.closed || this.onEvent(JSON.parse(data));
    this.socket.onclose = async ({ code, reason }) => {
      const kind = code === NORMAL || code === GOING_AWAY ? "ended" : "lost";
      this.lost(this.open ? { kind, reason } : await refusal(key, url.href));
    };
  }

  /** A short-lived secret for this key: keys may hold what a subprotocol must not. Empty if there is none. */
  async secret(key) {
    try {
      const init = { method: "POST", headers: { ...authorization(key), "Content-Type": "application/json" }, body: "{}" };
      const response = await fetch(address("v1/realtime/client_secrets"), init);
      if (response.ok) return (await response.json()).value;
    } catch {
      // refusal() asks once more and finds out why
    }
    this.lost(await refusal(key, address("v1/realtime").href));
    return "";
  }

  /** Send an event. Returns its event_id, which an error of the server names. */
  send(type, fields = {}) {
    const event_id = `page_${++this.count}`;
    const text = JSON.stringify({ type, event_id, ...fields });
    if (this.open) this.socket.send(text);
    else this.outbox.push(text);
    return event_id;
  }

  /** Send samples, an Int16Array of any length, in events of at most 5 s. */
  append(samples) {
    const most = 120_000;
    for (let at = 0; at < samples.length; at += most)
      this.send("input_audio_buffer.append", { audio: toBase64(samples.subarray(at, at + most)) });
  }

  close() {
    this.closed = true;
    this.socket?.close(NORMAL);
  }

  lost(problem) {
    if (this.closed) return;
    this.closed = true;
    this.onLost(problem);
  }
}

/** What this server serves: {model, voices, problem}; problem as refusal() gives it, or null. */
export async function greet(key) {
  try {
    const response = await fetch(address("v1/models"), { headers: authorization(key) });
    if (!response.ok) return { model: "", voices: [], problem: await fault(response) };
    const [{ id, voices }] = (await response.json()).data;
    return { model: id, voices, problem: null };
  } catch {
    return { model: "", voices: [], problem: { kind: "refused", address: location.origin } };
  }
}

/** Why a socket did not open: browsers do not tell, but a plain request shows it. */
async function refusal(key, url) {
  const { problem } = await greet(key);
  if (problem) return problem;
  const ready = await fetch(address("ready"));
  return ready.status === 503 ? await fault(ready) : { kind: "noSocket", address: url };
}

async function fault(response) {
  if (response.status === 401 || response.status === 403) return { kind: "key" };
  const body = await response.json().catch(() => ({}));
  return { kind: "busy", reason: body.error?.message ?? body.status ?? `HTTP ${response.status}` };
}
