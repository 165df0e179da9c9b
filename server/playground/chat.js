// The conversation: its turns, in order, and what is asked next. Knows nothing of settings but the fields they give.
import { AnswerView } from "./answer_view.js";
import { $, element, passFocus } from "./dom.js";
import { LogScroll } from "./log_scroll.js";

export class Chat {
  #messages = [];

  /** `picker` decides the mix; `sampling()` gives the other fields of a request. */
  constructor({ facts, picker, sampling }) {
    Object.assign(this, { facts, picker, sampling });
    this.scroll = new LogScroll($("chat-log"));
  }

  /** One turn. A failed one leaves the conversation as it was before, so that `retry` can ask again if it accepts it. */
  async ask(question, { signal, retry }) {
    passFocus($("chat-hint"), this.scroll.root);
    $("chat-hint").hidden = true;
    const messages = this.#messages; // a new chat may begin while the answer comes: it is still this one's
    const asked = element("p", { className: "asked", textContent: question });
    const answer = new AnswerView(this.facts);
    this.scroll.root.append(asked, answer.root);
    this.scroll.toEnd();
    messages.push({ role: "user", content: question });
    const body = { model: this.facts.model, messages, brainstacks: this.picker.field, ...this.sampling() };
    const again = async () => {
      if (!await retry(question)) return;
      passFocus(answer.root, this.scroll.root);
      asked.remove();
      answer.root.remove();
    };
    await answer.stream(body, { signal, onGrowth: () => this.scroll.follow(), retry: again });
    if (answer.text.value && !answer.failed) messages.push({ role: "assistant", content: answer.text.value });
    else messages.pop();
    if (answer.report) this.picker.suggest(answer.report.mix);
  }

  clear() {
    this.#messages = [];
    for (const turn of [...this.scroll.root.children]) if (turn !== $("chat-hint")) turn.remove();
    $("chat-hint").hidden = false;
  }
}
