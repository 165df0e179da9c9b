// Shows an answer's text while it grows: paragraphs, and fenced code as code. Knows plain text; nothing becomes markup.
import { element } from "./dom.js";

const FENCE = /^```[^\n]*$/m;

/** Alternating text and code, beginning with text. A fence that is still open counts as code. */
function blocksOf(text) {
  return text.split(FENCE).map((part, place) => ({ isCode: place % 2 === 1, text: place % 2 ? part.replace(/^\n|\n$/g, "") : part.trim().replace(/\n{3,}/g, "\n\n") }));
}

/** Draws at most once a frame, and only the blocks that changed. */
export class AnswerText {
  root = element("div", { className: "text" });
  value = "";
  #shown = [];
  #waits = false;

  add(text) {
    this.value += text;
    if (this.#waits) return;
    this.#waits = true;
    requestAnimationFrame(() => { this.#waits = false; this.draw(); });
  }

  draw() {
    const blocks = blocksOf(this.value).filter((block) => block.text);
    for (const [place, block] of blocks.entries()) {
      const before = this.#shown[place];
      if (before?.isCode === block.isCode) {
        if (before.text !== block.text) before.holder.textContent = block.text;
        this.#shown[place] = { ...block, holder: before.holder };
        continue;
      }
      const holder = element(block.isCode ? "code" : "p", { textContent: block.text });
      this.#shown.splice(place, Infinity, { ...block, holder });
      while (this.root.children.length > place) this.root.lastChild.remove();
      this.root.append(block.isCode ? element("pre", { tabIndex: 0 }, holder) : holder);
    }
  }
}
