// A problem in plain words, with what to do about it.

import { element, icon } from "./view.js";

/** What the notices of some kinds say beyond a title and a text. */
const MORE = {
  micInsecure: (say) => [
    element(
      "ul",
      {},
      element("li", {}, say("micInsecureTunnel", { local: `http://127.0.0.1:${port()}` }), code(tunnel())),
      element("li", {}, say("micInsecureTls"), code("covo-serve --tls-cert CERT --tls-key KEY")),
      element("li", {}, say("micInsecureFile")),
    ),
  ],
  lost: said,
  ended: said,
};

function said(say, { reason }) {
  return reason ? [element("p", {}, say("reason", { reason }))] : [];
}

/** An element for a problem {kind, action, ...}; kind names its words, action is {words, act}, or undefined. */
export function notice(found, say, close) {
  const { kind, action } = found;
  const closing = element("button", { type: "button", className: "quiet", onclick: close }, icon("close"));
  closing.ariaLabel = closing.title = say("close");
  const text = say(`${kind}Text`, { address: location.origin, ...found });
  const parts = [element("h2", {}, say(`${kind}Title`)), element("p", {}, text), ...(MORE[kind]?.(say, found) ?? [])];
  if (action) parts.push(element("button", { type: "button", className: "text main", onclick: action.act }, say(action.words)));
  return element("div", { className: "notice" }, element("div", {}, ...parts), closing);
}

const port = () => location.port || (location.protocol === "https:" ? "443" : "80");
const tunnel = () => `ssh -N -L ${port()}:127.0.0.1:${port()} ${location.hostname}`;
const code = (text) => element("code", {}, text);
