// The registered domains with their actions. Knows the admin API's domains; not how files get to the server.
import { confirmed } from "./confirm.js";
import { chip, counted, element, hued, inBytes } from "./dom.js";
import { failureBox } from "./failure_box.js";
import { adminKey, call } from "./server.js";
import { stateChips } from "./tiers.js";

const FILTERED_FROM = 12;

/** Dispatches `change` when the store was changed here, `refresh` when somebody else did it. */
export class DomainList extends EventTarget {
  shown = null;
  #items = new Map();
  #strangers = new Set(); // cache keys that were not among the domains when they were looked for
  #drains = new Map(); // cache key -> what is told while requests still use a version that is gone

  /** `replace(name)` is called when somebody wants other files for a domain. */
  constructor(holder, { facts, live, replace }) {
    super();
    Object.assign(this, { facts, live, replace });
    this.filter = element("input", { type: "search", placeholder: "Filter", "aria-label": "Filter domains" });
    this.filter.addEventListener("input", () => this.#applyFilter());
    this.list = element("ul", { className: "domains", role: "list", tabIndex: -1 });
    this.router = element("p", { className: "note" });
    this.said = element("div", { role: "status" });
    holder.append(this.filter, this.list, this.said, this.router);
    live.addEventListener("change", () => this.#follow());
    facts.addEventListener("change", () => this.#showFacts());
  }

  /** undefined while nothing is shown. */
  get generation() {
    return this.shown?.generation;
  }

  has(name) {
    return this.shown?.domains.some((domain) => domain.name === name) ?? false;
  }

  isRegistered(key) {
    return this.shown === null || this.shown.domains.some((domain) => keyOf(domain) === key);
  }

  /** RequestFailed with a wrong key. Shows nothing if the key was changed or forgotten meanwhile. */
  async refresh() {
    const asked = adminKey.value;
    const told = await call("GET", "admin/domains", { key: adminKey });
    if (adminKey.value !== asked) return;
    this.shown = told;
    this.#items.clear();
    const focused = this.list.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    this.list.replaceChildren(...this.shown.domains.map((domain) => this.#item(domain)));
    if (!this.shown.domains.length) this.list.append(element("li", { className: "note", textContent: "No domain is registered." }));
    this.filter.hidden = this.shown.domains.length < FILTERED_FROM;
    this.#applyFilter();
    this.#showFacts();
    this.#showStates();
    if (focused) this.list.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  }

  say(...parts) {
    this.said.replaceChildren(...parts);
  }

  #item(domain) {
    const chips = element("span", { className: "chips" });
    const pin = this.#button(domain, "Pin", () => this.#act(domain.name, this.#entry(domain)?.pinned ? "unpin" : "pin"));
    const item = element("li", {},
      element("div", { className: "what" },
        element("span", { className: "dot name", textContent: domain.name }),
        chips,
        element("span", { className: "faint", textContent: `${counted(domain.stacks.length, "round")}, ${inBytes(domain.bytes)} · ${domain.version.slice(0, 8)}` })),
      element("div", { className: "actions" }, pin,
        this.#button(domain, "Prefetch", () => this.#act(domain.name, "prefetch")),
        this.#button(domain, "Replace", () => this.replace(domain.name)),
        this.#button(domain, "Delete", () => this.#remove(domain), "danger")));
    item.dataset.domain = domain.name;
    this.#items.set(domain, { item, chips, pin });
    return item;
  }

  #button(domain, text, onclick, className = "") {
    return element("button", { type: "button", className, textContent: text, "aria-label": `${text} ${domain.name}`, onclick });
  }

  /** What the cache says of it, or, before the cache was seen, what the list itself said. */
  #entry(domain) {
    if (this.live.cache === null) return domain.state === "absent" ? undefined : domain;
    return this.live.cache.entries.find((entry) => entry.key === keyOf(domain));
  }

  /** A version in memory that is not listed here is draining, or somebody else has just registered it. */
  #follow() {
    if (this.shown === null) return;
    const unknown = (this.live.cache?.entries ?? []).map((entry) => entry.key).filter((key) => !this.isRegistered(key) && !this.#strangers.has(key));
    for (const key of unknown) this.#strangers.add(key);
    const forget = () => unknown.forEach((key) => this.#strangers.delete(key)); // so that the next look asks again
    if (unknown.length) this.refresh().then(() => this.dispatchEvent(new Event("refresh")), forget);
    else this.#showStates();
  }

  #showStates() {
    for (const [domain, { chips, pin }] of this.#items) {
      const states = domain.state === "damaged" ? [chip("damaged", "warn")] : stateChips(this.#entry(domain), { isInHost: this.#isInHost(domain) });
      chips.replaceChildren(...states);
      const text = this.#entry(domain)?.pinned ? "Unpin" : "Pin";
      pin.textContent = text;
      pin.setAttribute("aria-label", `${text} ${domain.name}`);
    }
    this.#showDrains();
  }

  #isInHost(domain) {
    return this.live.cache?.host?.entries.some((entry) => entry.key === keyOf(domain)) ?? false;
  }

  #showDrains() {
    for (const [key, line] of this.#drains) {
      const entry = this.live.cache?.entries.find((each) => each.key === key);
      const name = key.split("@")[0];
      if (entry) line.textContent = `${name} is deleted and draining: ${counted(entry.leases, "request")} still ${entry.leases === 1 ? "uses" : "use"} it.`;
      else if (this.live.cache) {
        line.textContent = `${name} is deleted; the last request that used it has ended.`;
        this.#drains.delete(key);
      }
    }
  }

  /** What the page learns of the server apart from this list: colours and the router's policy. */
  #showFacts() {
    if (this.shown === null) return;
    for (const [domain, { item }] of this.#items) hued(item, this.facts.hue(domain.name));
    const { router } = this.shown;
    const { policy } = this.facts;
    const parts = [router ? `Router ${router.digest.slice(0, 8)}` : "This store has no router: the base answers alone."];
    if (router && policy) {
      parts.push(`threshold ${policy.threshold.toFixed(2)}`, `floor ${policy.floor.toFixed(2)} for ${policy.floor_domain}`, `gap below ${policy.gap_threshold.toFixed(2)}`);
    }
    if (router?.stale.length) parts.push(`trained against other stacks of ${router.stale.join(", ")}`);
    this.router.textContent = parts.join(" · ");
  }

  #applyFilter() {
    const wanted = this.filter.value.trim().toLowerCase();
    for (const [domain, { item }] of this.#items) item.hidden = !domain.name.toLowerCase().includes(wanted);
  }

  async #act(name, action) {
    const done = { pin: "is resident and pinned", unpin: "may be evicted again", prefetch: "is resident or loading" }[action];
    if (action === "pin") this.say(element("p", { textContent: `${name} loads, to be pinned…` }));
    await this.#attempt(async () => {
      await call("POST", `admin/domains/${encodeURIComponent(name)}/${action}`, { key: adminKey });
      this.say(element("p", { textContent: `${name} ${done}.` }));
    });
    await this.live.look();
    if (this.live.cache === null) await this.refresh().catch(() => {}); // what the action itself said stays in sight
  }

  async #remove(domain) {
    const consequence = "Requests that use it finish first. Its files are removed from the store.";
    if (!await confirmed({ question: `Delete ${domain.name}?`, consequence, yes: "Delete" })) return;
    await this.#attempt(async () => {
      const answer = await call("DELETE", `admin/domains/${encodeURIComponent(domain.name)}`, { key: adminKey, generation: this.generation });
      const isDone = answer.status === "deleted";
      const text = isDone ? `${domain.name} is deleted; ${inBytes(answer.freed_bytes)} of memory are free again.` : `${domain.name} is deleted and draining.`;
      const line = element("p", { textContent: text });
      if (!isDone) this.#drains.set(keyOf(domain), line);
      this.say(line);
    });
    await this.refresh().catch(() => {}); // what the deletion itself said stays in sight
    this.dispatchEvent(new Event("change"));
    if (document.activeElement === document.body) (this.list.querySelector("button") ?? this.list).focus(); // the button that was pressed is gone
  }

  async #attempt(work) {
    try {
      await work();
    } catch (error) {
      this.say(failureBox(error, { forAdmin: true }));
    }
  }
}

function keyOf(domain) {
  return `${domain.name}@${domain.version}`;
}
