// What the user chose. Kept in the browser; the API key only until the tab is closed.

const DEFAULTS = { language: "", system: "", voice: "", temperature: "", seed: "", silence: "500", clean: true };
const UNASKED = { voices: [], speaks: true }; // of the server, until it has answered
const NAME = "covo";

export function load() {
  return { ...DEFAULTS, ...stored(localStorage, {}), key: stored(sessionStorage, ""), ...UNASKED };
}

export function save({ key, voices, speaks, ...rest }) {
  localStorage.setItem(NAME, JSON.stringify(rest));
  sessionStorage.setItem(NAME, JSON.stringify(key));
}

function stored(storage, otherwise) {
  try {
    return JSON.parse(storage.getItem(NAME)) ?? otherwise;
  } catch {
    return otherwise; // written by something else
  }
}
