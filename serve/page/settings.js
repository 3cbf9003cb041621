// What the user chose. Kept in the browser; the API key only until the tab is closed.

const DEFAULTS = { language: "", system: "", voice: "", temperature: "", seed: "", silence: "500", clean: true };
const UNASKED = { voices: [], speaks: true }; // of the server, until it has answered
const NAME = "covo";

export function load() {
  return { ...DEFAULTS, ...stored("localStorage", {}), key: stored("sessionStorage", ""), ...UNASKED };
}

export function save({ key, voices, speaks, ...rest }) {
  store("localStorage", rest);
  store("sessionStorage", key);
}

function stored(storage, otherwise) {
  try {
    return JSON.parse(window[storage].getItem(NAME)) ?? otherwise;
  } catch {
    return otherwise; // written by something else, or the browser keeps nothing for this page
  }
}

function store(storage, value) {
  try {
    window[storage].setItem(NAME, JSON.stringify(value));
  } catch {
    // it holds until the page is closed
  }
}
