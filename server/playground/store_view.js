// The store's page: tiers and traffic for everybody, administration with the key. Knows its parts and who may see them.
import { DomainList } from "./domain_list.js";
import { $, element } from "./dom.js";
import { failureBox } from "./failure_box.js";
import { RegisterForm } from "./register_form.js";
import { adminKey } from "./server.js";
import { tierDetails, trafficList } from "./tiers.js";

/** Whether the key opens is known once `open` has tried it. */
export class StoreView {
  constructor({ facts, live }) {
    Object.assign(this, { facts, live });
    this.domains = new DomainList($("domains"), { facts, live, replace: (name) => this.register.fill(name) });
    this.register = new RegisterForm($("register"), { domains: this.domains });
    for (const part of [this.domains, this.register]) part.addEventListener("change", () => this.#storeChanged());
    this.domains.addEventListener("refresh", () => this.#showGeneration());
    live.addEventListener("change", () => this.#show());
    $("admin-key").value = adminKey.value;
    $("admin-key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      adminKey.value = $("admin-key").value.trim();
      this.open();
    });
    $("forget-key").addEventListener("click", () => {
      adminKey.value = $("admin-key").value = "";
      this.open();
      $("admin-key").focus();
    });
  }

  /** Tries the key, if there is one, and shows what it opens. What was open stays so unless the key is refused. */
  async open() {
    const asked = adminKey.value;
    let failure = null;
    $("unlock-said").replaceChildren();
    try {
      if (asked) await this.domains.refresh();
    } catch (error) {
      failure = error;
    }
    if (adminKey.value !== asked) return; // whoever changed it has opened anew
    if (failure !== null) $("unlock-said").replaceChildren(failureBox(failure, { forAdmin: true }));
    if (failure?.isRefusal) adminKey.value = "";
    const isOpen = adminKey.value !== "" && this.domains.shown !== null;
    if (!isOpen) this.domains.shown = null;
    $("unlock-note").hidden = isOpen;
    $("forget-key").hidden = !isOpen;
    for (const id of ["domains-card", "register-card"]) $(id).hidden = !isOpen;
    this.#showGeneration();
    await this.live.look();
  }

  async #storeChanged() {
    await this.domains.refresh().catch(() => {}); // what the change itself said stays in sight
    this.#showGeneration();
    await Promise.all([this.facts.refresh().catch(() => {}), this.live.look()]);
  }

  #showGeneration() {
    $("generation").textContent = this.domains.shown ? `generation ${this.domains.generation}` : "";
  }

  #show() {
    if (!this.live.metrics) {
      const told = $("tiers").querySelector(".message")?.textContent;
      if (told !== this.live.failure.message) $("tiers").replaceChildren(failureBox(this.live.failure)); // an alert is read out once
      return;
    }
    const stale = this.live.failure ? [element("p", { className: "note", textContent: "Not everything was answered; this is what was seen last." })] : [];
    $("tiers").replaceChildren(...stale, ...tierDetails(this.live, this.facts, (key) => this.domains.isRegistered(key)));
    $("traffic").replaceChildren(trafficList(this.live));
  }
}
