// Lets somebody say who decides the mix: the router, nobody, everybody, or sliders. Knows domains and weights only.
import { element, hued } from "./dom.js";
import { mixInWords } from "./mix_report.js";

const CHOICES = [["auto", "Router"], ["base", "Base"], ["all", "All"], ["mix", "Custom"]];
const STEP = 0.05;

/** Dispatches `change`. */
export class MixPicker extends EventTarget {
  #sliders = new Map();

  constructor(holder, { name, facts, mode = "auto", mix = {} }) {
    super();
    this.facts = facts;
    this.name = name;
    this.initialMix = mix;
    this.list = element("div", { className: "sliders" });
    this.choices = CHOICES.map(([value, text]) => {
      const input = element("input", { type: "radio", name, value, checked: value === mode });
      input.addEventListener("change", () => this.#changed());
      return element("label", {}, input, element("span", { textContent: text }));
    });
    holder.append(element("fieldset", { className: "segments" }, element("legend", { className: "hidden", textContent: "Who decides the mix" }), ...this.choices), this.list);
    facts.addEventListener("change", () => this.#showDomains());
    this.#showDomains();
  }

  get mode() {
    return this.choices.map((label) => label.firstChild).find((input) => input.checked).value;
  }

  get mix() {
    return Object.fromEntries([...this.#sliders].map(([domain, input]) => [domain, Number(input.value)]).filter(([, weight]) => weight > 0));
  }

  /** The request's `brainstacks` field. */
  get field() {
    return this.mode === "mix" ? { mix: this.mix } : { mode: this.mode };
  }

  get inWords() {
    return { auto: "router", base: "base alone", all: "all domains", mix: mixInWords(this.mix) }[this.mode];
  }

  /** Where custom sliders begin, as long as nobody moved them. */
  suggest(mix) {
    if (this.mode === "mix" || Object.keys(this.mix).length) return;
    this.initialMix = mix;
  }

  #changed() {
    if (this.mode === "mix" && !Object.keys(this.mix).length) this.#set(this.initialMix);
    this.list.hidden = this.mode !== "mix";
    this.dispatchEvent(new Event("change"));
  }

  #set(mix) {
    for (const [domain, input] of this.#sliders) {
      input.value = mix[domain] ?? 0;
      input.dispatchEvent(new Event("input"));
    }
  }

  #showDomains() {
    const before = this.mix;
    this.#sliders.clear();
    this.list.replaceChildren(...this.facts.domains.map((domain, place) => {
      const id = `${this.name}-${place}`;
      const value = before[domain] ?? 0;
      const input = element("input", { type: "range", id, min: 0, max: 1, step: STEP, value });
      const output = element("output", { for: id, textContent: value.toFixed(2) });
      const row = element("div", { className: "slider" }, element("label", { for: id, textContent: domain }), input, output);
      input.addEventListener("input", () => {
        output.textContent = Number(input.value).toFixed(2);
        this.dispatchEvent(new Event("change"));
      });
      this.#sliders.set(domain, input);
      return hued(row, this.facts.hue(domain));
    }));
    this.list.hidden = this.mode !== "mix";
    this.dispatchEvent(new Event("change"));
  }
}
