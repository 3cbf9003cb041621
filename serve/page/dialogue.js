// One dialogue over /v1/realtime: what was asked, what is answered, what of it was heard.

import { Connection } from "./connection.js";
import { RATE, fromBase64, joined } from "./sound.js";

const SHORTEST_SAMPLES = 0.2 * RATE;
const KEPT_SAMPLES = 2 * RATE; // of silence, hands-free: what a turn may begin with
const ENDINGS = new Set(["session_idle", "session_expired", "server_ending"]); // the connection's end says it, too

export class Dialogue {
  /**
   * speaker: where replies are played; settings: read when a connection opens;
   * on: {changed(), asked(turn), replying(reply), updated(reply), problem(problem), restarted()}.
   */
  constructor(speaker, settings, on) {
    this.speaker = speaker;
    this.settings = settings;
    this.on = on;
    this.connection = null;
    this.begun = false; // whether something was asked: the next connection begins a new dialogue
    this.forget();
  }

  forget() {
    this.handsFree = false;
    this.heard = null; // hands-free: where the turn that is going on began, in samples
    this.frames = []; // of the turn that is going on
    this.framesBegin = 0; // position of the first one in all that was sent
    this.position = 0; // samples sent
    this.endedAt = 0; // when the last question ended
    this.asking = false; // a question was sent and no reply has begun
    this.givenUp = false; // it was, and the reply that may have begun is not wanted
    this.silencing = null; // the promise of the last interruption
    this.reply = null; // the one that is generated or played
    this.ignored = new Set(); // ids of events whose errors tell nothing: what they ask may have happened by itself
  }

  /** thinking: a reply is due and has no sound yet. */
  get thinking() {
    const { reply } = this;
    const due = reply && !reply.started && !reply.muted && (!reply.done || reply.samples);
    return this.asking || Boolean(due);
  }

  /** speaking: a reply is heard. */
  get speaking() {
    return Boolean(this.reply?.playing);
  }

  /** hearing: hands-free, a turn is going on. */
  get hearing() {
    return this.heard !== null;
  }

  /** Connect, unless connected. handsFree: whether the server finds the ends of turns, or the button. */
  connect(handsFree) {
    if (this.connection) return this.change(handsFree);
    this.forget();
    this.handsFree = handsFree;
    if (this.begun) this.on.restarted();
    this.begun = false; // it is said once, however often the server does not answer
    this.connection = new Connection(
      (event) => this.handlers[event.type]?.(event),
      (problem) => this.lost(problem),
    );
    this.connection.connect(this.settings.key);
    this.configure();
  }

  /** Tell the server the settings. */
  configure() {
    if (!this.connection) return;
    const { system, voice, voices, temperature, seed, silence, speaks } = this.settings;
    const turn_detection = this.handsFree
      ? { type: "server_vad", silence_duration_ms: Number(silence), create_response: true, interrupt_response: true }
      : null;
    const session = {
      type: "realtime",
      output_modalities: [speaks ? "audio" : "text"],
      audio: {
        input: { format: { type: "audio/pcm", rate: RATE }, turn_detection },
        output: { format: { type: "audio/pcm", rate: RATE }, ...(voices.includes(voice) && { voice }) },
      },
    };
    if (system) session.instructions = system;
    if (temperature !== "") session.temperature = Number(temperature);
    if (seed !== "") session.seed = Number(seed);
    this.connection.send("session.update", { session });
  }

  change(handsFree) {
    if (this.handsFree === handsFree && !this.frames.length) return; // else a question was begun and given up
    this.handsFree = handsFree;
    this.connection.send("input_audio_buffer.clear");
    this.dropFrames(this.position);
    this.heard = null;
    this.configure();
  }

  /** More of the question, an Int16Array. */
  append(samples) {
    this.connection.append(samples);
    this.frames.push(samples);
    this.position += samples.length;
    if (this.handsFree && this.heard === null) this.dropFrames(this.position - KEPT_SAMPLES);
  }

  dropFrames(before) {
    while (this.frames.length && this.framesBegin + this.frames[0].length <= before)
      this.framesBegin += this.frames.shift().length;
  }

  /** The question is complete. Returns whether it was long enough to be one. */
  async ask() {
    await this.silencing; // so that the server knows what was heard before it answers
    if (!this.connection) return true;
    const samples = joined(this.frames);
    this.dropFrames(this.position);
    if (samples.length < SHORTEST_SAMPLES) {
      this.connection.send("input_audio_buffer.clear");
      return false;
    }
    this.connection.send("input_audio_buffer.commit");
    this.connection.send("response.create");
    this.askedNow(samples);
    return true;
  }

  askedNow(samples) {
    this.begun = true;
    this.endedAt = performance.now();
    this.asking = true;
    this.givenUp = false;
    this.on.asked({ samples });
    this.on.changed();
  }

  /** End the reply: what is generated, and what is heard. The server keeps only what was heard. */
  async interrupt() {
    const { reply, connection } = this;
    if (connection && (this.asking || (reply && !reply.done))) {
      const response = reply && !reply.done ? { response_id: reply.response } : {};
      this.ignored.add(connection.send("response.cancel", response));
      this.givenUp = this.asking; // what the server had begun to answer before it knew
      this.asking = false;
    }
    this.silencing = this.silence();
    await this.silencing;
  }

  async silence() {
    const { reply, connection } = this;
    if (reply) reply.muted = true; // what still arrives of it is not played
    const { id, played, gaps } = await this.speaker.stop();
    if (id === null || id !== reply?.item) return; // nothing of it was played
    const heard_ms = Math.max(0, Math.floor(1000 * (played / RATE - this.speaker.latency)));
    Object.assign(reply, { playing: false, heardSamples: played, gaps });
    if (connection && !connection.closed)
      this.ignored.add(
        connection.send("conversation.item.truncate", { item_id: id, content_index: 0, audio_end_ms: heard_ms }),
      );
    this.on.updated(reply);
    this.on.changed();
  }

  /** End the dialogue; the next question begins a new one. */
  close() {
    this.connection?.close();
    this.connection = null;
    this.silence();
    if (this.reply && !this.reply.done) this.finish(this.reply, "cancelled", "");
    this.forget();
    this.on.changed();
  }

  lost(problem) {
    this.connection = null;
    const { reply } = this;
    this.asking = false;
    this.heard = null;
    if (reply && !reply.done) {
      this.finish(reply, "lost", "");
      if (!reply.muted && reply.item) this.speaker.end(); // what has arrived is still played
    }
    this.on.problem(problem);
    this.on.changed();
  }

  finish(reply, status, message) {
    Object.assign(reply, { done: true, status, message });
    this.on.updated(reply);
  }

  /** A report of the speaker. */
  report({ type, id, played, gaps }) {
    const { reply } = this;
    if (!reply || id === null || id !== reply.item) return;
    if (type === "started") reply.firstMs = performance.now() + 1000 * this.speaker.latency - reply.askedAt;
    Object.assign(reply, { started: true, playing: type !== "finished", heardSamples: played, gaps });
    this.on.updated(reply);
    if (type === "started" || type === "finished") this.on.changed();
  }

  /** The reply that an event speaks of, unless it is one that was given up. */
  current({ response_id }) {
    return this.reply?.response === response_id ? this.reply : null;
  }

  handlers = {
    "input_audio_buffer.speech_started": ({ audio_start_ms }) => {
      this.heard = (audio_start_ms * RATE) / 1000;
      this.dropFrames(this.heard);
      this.asking = false;
      this.silence(); // the server cancels the reply by itself
      this.on.changed();
    },

    "input_audio_buffer.speech_stopped": ({ audio_end_ms }) => {
      const all = joined(this.frames);
      const samples = all.slice(Math.max(0, this.heard - this.framesBegin), (audio_end_ms * RATE) / 1000 - this.framesBegin);
      this.heard = null;
      this.askedNow(samples);
    },

    "input_audio_buffer.cleared": () => {
      if (this.heard === null) return;
      this.heard = null; // the turn that was going on is none
      this.dropFrames(this.position);
      this.on.changed();
    },

    "response.created": ({ response }) => {
      this.asking = false;
      this.reply = {
        response: response.id,
        item: null,
        text: "",
        chunks: [],
        samples: 0,
        askedAt: this.endedAt,
        firstMs: null, // from the end of the question to the first sound that was heard
        arrivedMs: null, // to the last sound that arrived
        heardSamples: 0,
        gaps: 0,
        started: false,
        playing: false,
        muted: this.givenUp,
        done: false,
        status: "in_progress",
        message: "",
      };
      this.on.replying(this.reply);
      this.on.changed();
    },

    "response.output_audio_transcript.delta": (event) => this.words(event),
    "response.output_text.delta": (event) => this.words(event),

    "response.output_audio.delta": (event) => {
      const reply = this.current(event);
      if (!reply || reply.muted) return;
      const samples = fromBase64(event.delta);
      if (!reply.item) {
        reply.item = event.item_id;
        this.speaker.start(reply.item);
      }
      reply.chunks.push(samples);
      reply.samples += samples.length;
      reply.arrivedMs = performance.now() - reply.askedAt;
      this.speaker.push(samples);
      this.on.updated(reply);
    },

    "response.output_audio.done": (event) => {
      const reply = this.current(event);
      if (reply?.item && !reply.muted) this.speaker.end();
    },

    "response.done": ({ response }) => {
      const reply = this.current({ response_id: response.id });
      if (!reply) return;
      if (reply.item && !reply.muted) this.speaker.end(); // if it failed, .done did not come
      this.finish(reply, response.status, response.status_details?.error?.message ?? response.status_details?.reason ?? "");
      this.on.changed();
    },

    error: ({ error }) => {
      if (this.ignored.has(error.event_id) || ENDINGS.has(error.code)) return;
      this.asking = false;
      this.on.problem({ kind: "server", reason: error.message });
      this.on.changed();
    },
  };

  words(event) {
    const reply = this.current(event);
    if (!reply || reply.muted) return;
    reply.text += event.delta;
    this.on.updated(reply);
  }
}
