// What the server is: its model, domains and router policy. Tells listeners when they change; shows nothing.
import { call } from "./server.js";

const OUTDATED = ["model_not_found", "domain_not_found"];
const EMPTY_TEXT = " "; // has no words, so that it is not read by the router

/** Dispatches `change`. */
export class ServerFacts extends EventTarget {
  model = null; // until the server told
  domains = [];
  policy = null;

  /** RequestFailed if the server does not tell its models. */
  async refresh() {
    const names = (await call("GET", "v1/models")).data.map((model) => model.id);
    this.model = names[0];
    this.domains = names.slice(1).map((name) => name.slice(this.model.length + 1)).filter((name) => name !== "base");
    this.policy = await this.#routerPolicy();
    this.dispatchEvent(new Event("change"));
  }

  /** Forgets the model if the failure shows that the server has changed, so that whoever asks next refreshes first. */
  doubt(failure) {
    if (OUTDATED.includes(failure.code)) this.model = null;
  }

  /** The hue that stands for a domain everywhere on the page, in degrees. */
  hue(domain) {
    const place = this.domains.indexOf(domain);
    return ((place < 0 ? this.domains.length : place) * 137.5 + 265) % 360;
  }

  async #routerPolicy() {
    try {
      return (await call("POST", "v1/route", { body: { prompt: EMPTY_TEXT } })).policy;
    } catch (error) {
      if (error.code === "router_not_found") return null;
      if (error.status === 429) return this.policy;
      throw error;
    }
  }
}
