// Tells screen readers what streams in, sentence by sentence. Knows text, not where it is shown.
import { $ } from "./dom.js";

const SENTENCE_END = /[.!?:](\s|$)|\n/g;

export function announce(text) {
  $("announcer").textContent = text;
}

/** One answer that is read out while it comes: whole sentences, because single tokens would be noise. */
export class SpokenAnswer {
  #rest = "";

  constructor(label) {
    this.label = label;
    announce(`${label} begins.`);
  }

  add(text) {
    this.#rest += text;
    const end = [...this.#rest.matchAll(SENTENCE_END)].at(-1);
    if (end === undefined) return;
    const said = this.#rest.slice(0, end.index + 1);
    this.#rest = this.#rest.slice(end.index + 1);
    if (said.trim()) announce(said.trim());
  }

  end(summary) {
    announce(`${this.#rest.trim()} ${this.label} ends. ${summary}`.trim());
  }
}
