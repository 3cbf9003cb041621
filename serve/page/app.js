// The page: buttons, keys, words and notices, around one dialogue.

import { greet } from "./connection.js";
import { Dialogue } from "./dialogue.js";
import { Microphone, secure } from "./microphone.js";
import { notice } from "./notice.js";
import { load, save } from "./settings.js";
import { decoded } from "./sound.js";
import { Speaker } from "./speaker.js";
import { firstLanguage, strings } from "./strings.js";
import { Bars, QuestionCard, ReplyCard, element } from "./view.js";

const TAP_MS = 300; // a press that is shorter begins, and the next one sends
const LEAD_FRAMES = 5; // 200 ms from before the press: who presses talks already

const $ = (id) => document.getElementById(id);

let settings = load();
let language = firstLanguage(settings.language);
let say = strings(language);
let mode = "press"; // or handsFree
let down = null; // the press while the button or the key is down: {since, up, tap}
let key = null; // the one that pressed
let opening = false; // the microphone is being opened
let recording = null; // press and talk: "held" or "latched"; hands-free: "free"
let hint = null; // a word for the status line until something else happens
let lead = []; // the last frames before a press
let cards = [];
let replay = null; // the card that is played again

const format = (value, digits) =>
  new Intl.NumberFormat(language, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);

const bars = new Bars($("bars"), $("level"));
const microphone = new Microphone(heardFrame, () => {
  endRecording();
  problem({ kind: "micMissing" });
  changed();
});
const speaker = new Speaker((report) => {
  dialogue.report(report);
  if (replay && report.id === replay.sound) {
    replay.heardSamples = report.played;
    if (report.type === "finished" || report.type === "stopped") endReplay();
    else replay.show(say, format);
  }
  if (report.type === "finished") bars.clear();
  else if (recording !== "held" && recording !== "latched") bars.add(report.level);
});
const dialogue = new Dialogue(speaker, settings, {
  changed,
  asked: ({ samples }) => add(new QuestionCard($("log"), cards.length + 1, samples, play)),
  replying: (reply) => add(new ReplyCard($("log"), cards.length + 1, reply, play)),
  updated: (reply) => {
    const card = cards.find((one) => one.reply === reply);
    if (!card) return;
    card.playing = reply.playing;
    card.show(say, format);
    follow();
  },
  problem: (found) => {
    if (!dialogue.connection) endRecording();
    problem(found);
  },
  restarted: () => {
    const line = element("p", { className: "divider", textContent: say("restarted") });
    line.dataset.words = "restarted";
    $("log").append(line);
  },
});

// --- what is asked -------------------------------------------------------------------------------------------------

function heardFrame(frame, rms) {
  if (recording) dialogue.append(frame);
  else lead = [...lead, frame].slice(-LEAD_FRAMES);
  if (recording && !dialogue.speaking && !replay) bars.add(rms);
}

/** Open the microphone and the loudspeaker. Returns whether both work. To be called from a press. */
async function openSound() {
  if (microphone.clean !== settings.clean) microphone.close();
  if (!microphone.opening) lead = []; // of a microphone that was closed meanwhile
  hint = null;
  opening = true;
  changed();
  const [fault, heard] = await Promise.all([microphone.open(settings.clean), openSpeaker()]);
  opening = false;
  if (fault) problem(fault);
  changed();
  return heard && !fault;
}

async function openSpeaker() {
  try {
    await speaker.open();
    return true;
  } catch (error) {
    problem(error.name === "NetworkError" ? { kind: "refused" } : { kind: "audio", reason: error.message });
    return false;
  }
}

/** The button or the key goes down. */
async function press() {
  if (down || opening) return;
  const mine = { since: performance.now(), up: false, tap: false };
  down = mine;
  if (recording === "free") return stopListening();
  if (recording) return send();
  interrupt();
  clearNotice();
  if (!(await openSound())) return;
  if (mode === "press" && mine.up && !mine.tap) {
    hint = "micReady"; // let go while the browser asked for permission
  } else {
    dialogue.connect(mode === "handsFree");
    lead.forEach((frame) => dialogue.append(frame));
    lead = [];
    recording = mode === "handsFree" ? "free" : mine.up ? "latched" : "held";
  }
  changed();
}

/** The button or the key comes up. */
function release() {
  if (!down) return;
  down.up = true;
  down.tap = performance.now() - down.since < TAP_MS;
  if (recording === "held") {
    if (down.tap) recording = "latched";
    else send();
  }
  down = null;
  changed();
}

async function send() {
  endRecording();
  if (!(await dialogue.ask())) hint = "tooShort";
  changed();
}

function stopListening() {
  endRecording();
  if (dialogue.connection) dialogue.connect(false);
  changed();
}

function endRecording() {
  if (recording === "free") microphone.close();
  recording = null;
  bars.clear();
}

/** The reply ends, or what is played again. */
function interrupt() {
  bars.clear();
  return dialogue.interrupt();
}

async function askFile(file) {
  clearNotice();
  let samples;
  try {
    samples = await decoded(file);
  } catch {
    return problem({ kind: "file", name: file.name });
  }
  if (!(await openSpeaker())) return;
  interrupt();
  endRecording();
  dialogue.connect(false);
  dialogue.append(samples);
  if (!(await dialogue.ask())) hint = "tooShort";
  changed();
}

// --- what is heard -------------------------------------------------------------------------------------------------

async function play(card) {
  const again = replay !== card && !card.playing;
  if (!(await openSpeaker())) return;
  await interrupt();
  if (!again) return;
  replay = card;
  card.playing = true;
  speaker.start(card.sound);
  speaker.push(card.samples);
  speaker.end();
  card.show(say, format);
  changed();
}

function endReplay() {
  replay.playing = false;
  replay.show(say, format);
  replay = null;
  changed();
}

// --- what is shown -------------------------------------------------------------------------------------------------

function add(card) {
  $("welcome").hidden = true;
  cards.push(card);
  card.show(say, format);
  follow(true);
}

/** Keep the newest in sight, unless the reader has scrolled up. */
function follow(always = false) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

function status() {
  if (opening) return "opening";
  if (recording === "held") return "recording";
  if (recording === "latched") return "latched";
  if (dialogue.hearing) return "hearing";
  if (dialogue.thinking) return "thinking";
  if (dialogue.speaking) return recording === "free" ? "speakingFree" : "speaking";
  if (hint) return hint;
  if (recording === "free") return "waiting";
  return mode === "handsFree" ? "readyHandsFree" : "ready";
}

const TALK = { held: "talkSend", latched: "talkSend", free: "talkEnd" };
const TALK_ICONS = { held: "send", latched: "send", free: "mic" };

function changed() {
  const now = status();
  if ($("status").dataset.words !== now) {
    $("status").dataset.words = now;
    $("status").textContent = say(now);
  }
  document.body.dataset.state = now;
  $("talk").ariaLabel = $("talk").title = say(TALK[recording] ?? (mode === "handsFree" ? "talkListen" : "talkHold"));
  $("talk").ariaPressed = String(Boolean(recording));
  $("talk").querySelector("use").setAttribute("href", `#icon-${TALK_ICONS[recording] ?? "mic"}`);
  $("stop").disabled = !(dialogue.thinking || dialogue.speaking || replay);
  $("new").disabled = !cards.length;
}

function problem(found) {
  if (found.kind === "key") found.action = { words: "keyOpen", act: openSettings };
  if (found.kind.startsWith("mic") && found.kind !== "micInsecure")
    found.action = { words: "retry", act: () => openSound().then((ok) => ok && clearNotice()) };
  $("notice").replaceChildren(notice(found, say, clearNotice));
  $("notice").found = found;
}

function clearNotice() {
  $("notice").replaceChildren();
  $("notice").found = null;
}

function speak(chosen) {
  language = chosen;
  say = strings(language);
  document.documentElement.lang = language;
  document.title = say("title");
  for (const node of document.querySelectorAll("[data-words]")) node.textContent = say(node.dataset.words);
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = node.title = say(node.dataset.label);
  for (const id of ["scroll", "log", "dock"]) $(id).removeAttribute("title");
  $("language").lang = language === "en" ? "zh-CN" : "en";
  $("language").textContent = say("otherLanguage");
  cards.forEach((card) => card.show(say, format));
  if ($("notice").found) problem($("notice").found);
  changed();
}

// --- settings ------------------------------------------------------------------------------------------------------

const FIELDS = ["key", "system", "temperature", "seed", "silence"];
const OPENING = ["key", "system"]; // what only a new dialogue can change

function openSettings() {
  for (const name of FIELDS) $(name).value = settings[name];
  const { voice, voices } = settings;
  $("voice-field").hidden = voices.length < 2;
  $("voice").replaceChildren(...voices.map((name) => element("option", { selected: name === voice }, name)));
  $("clean").checked = settings.clean;
  $("settings").returnValue = "cancel";
  $("settings").showModal();
}

function saveSettings() {
  if ($("settings").returnValue !== "save") return;
  const before = { ...settings };
  for (const name of FIELDS) settings[name] = $(name).value;
  settings.clean = $("clean").checked;
  if (settings.voices.length > 1) settings.voice = $("voice").value;
  save(settings);
  const emptied = FIELDS.some((name) => before[name] !== "" && settings[name] === ""); // nothing says "the server's own"
  if (emptied || OPENING.some((name) => before[name] !== settings[name])) {
    endRecording();
    dialogue.close();
    clearNotice();
    greetServer();
  } else dialogue.configure();
}

async function greetServer() {
  const greeting = await greet(settings.key);
  $("model").textContent = greeting.model;
  settings.voices = greeting.voices;
  settings.speaks = Boolean(greeting.problem) || greeting.voices.length > 0;
  if (greeting.problem) problem(greeting.problem);
}

// --- wiring --------------------------------------------------------------------------------------------------------

const talk = $("talk");
let byHand = false; // the click that follows a press says nothing new

talk.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  talk.setPointerCapture(event.pointerId);
  byHand = true;
  press();
});
talk.addEventListener("pointerup", release);
talk.addEventListener("pointercancel", release);
talk.addEventListener("contextmenu", (event) => event.preventDefault());
talk.addEventListener("click", () => {
  if (!byHand) {
    press(); // a screen reader's click: begins, or sends
    release();
  }
  byHand = false;
});

/** Whether a key is for the talk button: not while one writes, chooses or presses another button. */
function forTalking(event) {
  if ($("settings").open || event.ctrlKey || event.altKey || event.metaKey) return false;
  if (event.target === talk) return event.code === "Space" || event.code === "Enter";
  return event.code === "Space" && !event.target.closest("input, textarea, select, button, a");
}

document.addEventListener("keydown", (event) => {
  if (event.code === "Escape" && !$("settings").open) return interrupt();
  if (!forTalking(event)) return;
  event.preventDefault();
  if (event.repeat) return;
  key = event.code;
  press();
});
document.addEventListener("keyup", (event) => {
  if (event.code !== key) return; // wherever the focus is by now, and with whatever else is held
  key = null;
  event.preventDefault();
  release();
});
window.addEventListener("blur", release); // the key comes up elsewhere
document.addEventListener("visibilitychange", () => {
  if (document.hidden && !recording && !opening) microphone.close(); // nobody likes a microphone that stays open
});

for (const choice of document.getElementsByName("mode"))
  choice.addEventListener("change", () => {
    if (recording === "free") stopListening();
    mode = choice.value;
    hint = null;
    changed();
  });

$("stop").addEventListener("click", interrupt);
$("upload").addEventListener("change", ({ target }) => {
  if (target.files.length) askFile(target.files[0]);
  target.value = ""; // the same file may be asked again
});
$("new").addEventListener("click", () => {
  interrupt();
  endRecording();
  dialogue.close();
  dialogue.begun = false;
  cards.forEach((card) => card.remove());
  cards = [];
  $("log").replaceChildren();
  $("welcome").hidden = false;
  changed();
});
$("language").addEventListener("click", () => {
  settings.language = $("language").lang;
  save(settings);
  speak(settings.language);
});
$("settings-open").addEventListener("click", openSettings);
$("settings-close").addEventListener("click", () => $("settings").close()); // no submit button: Enter saves
$("settings").addEventListener("close", saveSettings);

speak(language);
greetServer();
if (!secure()) problem({ kind: "micInsecure" });
