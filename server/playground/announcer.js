// Tells screen readers what streams in, sentence by sentence. Knows text, not where it is shown.
import { $, element } from "./dom.js";

const SENTENCE_END = /[.!?:](\s|$)|\n/g;
const MAX_LINES = 8;

/** Each text is a line of its own: one that replaced another would silence it. */
export function announce(text) {
  const lines = $("announcer");
  lines.append(element("p", { textContent: text }));
  if (lines.children.length > MAX_LINES) lines.firstChild.remove();
}

/** One answer that is read out while it comes: whole sentences, because single tokens would be noise. */
export class SpokenAnswer {
  #rest = "";

  /** `isWhole`: all of it at its end, because the sentences of two answers at once would mix. */
  constructor(label, { isWhole }) {
    Object.assign(this, { label, isWhole });
    announce(`${label} begins.`);
  }

  add(text) {
    this.#rest += text;
    if (this.isWhole) return;
    const end = [...this.#rest.matchAll(SENTENCE_END)].at(-1);
    if (end === undefined) return;
    const said = this.#rest.slice(0, end.index + 1);
    this.#rest = this.#rest.slice(end.index + 1);
    if (said.trim()) announce(said.trim());
  }

  end(summary) {
    const opening = this.isWhole ? `${this.label}: ` : "";
    announce(`${opening}${this.#rest.trim()} ${this.label} ends. ${summary}`.trim());
  }
}
