// The same question to two mixes at once, side by side. Knows two pickers and no conversation.
import { AnswerView } from "./answer_view.js";
import { $, element } from "./dom.js";
import { LogScroll } from "./log_scroll.js";
import { MixPicker } from "./mix_picker.js";

const MAX_SEED = 2 ** 31;

export class Compare {
  constructor({ facts, sampling }) {
    Object.assign(this, { facts, sampling });
    this.scroll = new LogScroll($("compare-log"));
    this.sides = [["A", "side-a", "auto"], ["B", "side-b", "base"]].map(([name, id, mode]) => {
      const picker = new MixPicker($(id), { name: id, facts, mode });
      const show = () => { $(id).querySelector("summary span").textContent = picker.inWords; };
      picker.addEventListener("change", show);
      show();
      return { name, picker };
    });
  }

  /** Both at once, with one seed, so that only the mix differs. */
  async ask(question, { signal }) {
    $("compare-hint").hidden = true;
    const seed = Math.floor(Math.random() * MAX_SEED);
    const pairs = this.sides.map(({ name, picker }) => {
      const view = new AnswerView(this.facts, { label: `Answer ${name}`, title: `${name} · ${picker.inWords}`, isOneOfTwo: true });
      return { view, field: picker.field };
    });
    this.scroll.root.append(element("p", { className: "asked", textContent: question }),
      element("div", { className: "pair" }, ...pairs.map(({ view }) => view.root)));
    this.scroll.toEnd();
    const messages = [{ role: "user", content: question }];
    await Promise.all(pairs.map(({ view, field }) => {
      const body = { model: this.facts.model, messages, brainstacks: field, seed, ...this.sampling() };
      return view.stream(body, { signal, onGrowth: () => this.scroll.follow() });
    }));
  }

  clear() {
    for (const part of [...this.scroll.root.children]) if (part !== $("compare-hint")) part.remove();
    $("compare-hint").hidden = false;
  }
}
