// Shows what went wrong and what to do about it. Knows error codes that a user of this page can mend.
import { element } from "./dom.js";

const ADVICE = {
  network: "Check that the server runs and that this page was loaded from it.",
  queue_full: "The server is busy; try again in a moment.",
  context_length_exceeded: "Begin a new chat, or ask for fewer tokens.",
  generation_conflict: "Somebody else changed the store meanwhile. The list below is up to date again: look at it, then repeat.",
  admin_disabled: "Start the server with BRAINSTACKS_SERVER__ADMIN_KEY set.",
  import_disabled: "Upload the files instead, or start the server with BRAINSTACKS_STORE__IMPORT_ROOT set.",
};

/** `forAdmin`: which of the two keys was wrong. `retry`: what a button tries again. */
export function failureBox(error, { forAdmin = false, retry = null } = {}) {
  const advice = error.isAboutKey ? `Enter ${forAdmin ? "the right admin key" : "an API key of this server under Settings, Access"}.` : ADVICE[error.code];
  const facts = [error.code ?? error.name, error.status && `status ${error.status}`, error.requestId];
  return element("div", { className: "failure", role: "alert" },
    element("p", { className: "message", textContent: error.message }),
    advice && element("p", { textContent: advice }),
    element("p", { className: "codes", textContent: facts.filter(Boolean).join(" · ") }),
    retry && element("button", { type: "button", textContent: "Try again", onclick: retry }));
}
