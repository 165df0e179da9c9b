// Looks at the server's counters, and with the admin key at its cache, again and again. Knows both formats, no display.
import { adminKey, call, metricsText } from "./server.js";

const CALM_MILLISECONDS = 5000;
const HURRIED_MILLISECONDS = 1000;

const SAMPLE = /^(\w+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** What Prometheus would scrape. */
export class Metrics {
  #samples = [];

  constructor(text) {
    for (const line of text.split("\n")) {
      const match = line.startsWith("#") ? null : SAMPLE.exec(line);
      if (!match) continue;
      const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
      this.#samples.push({ name: match[1], labels, value: Number(match[3]) });
    }
  }

  /** Over the samples that carry the labels; 0 without any. */
  sum(name, labels = {}) {
    return this.#samples
      .filter((sample) => sample.name === `brainstacks_${name}` && Object.entries(labels).every(([key, value]) => sample.labels[key] === value))
      .reduce((total, sample) => total + sample.value, 0);
  }

  /** The tiers that have a budget. */
  get tiers() {
    const budgets = this.#samples.filter((sample) => sample.name === "brainstacks_stack_cache_budget_bytes" && sample.value > 0);
    return budgets.map((sample) => sample.labels.tier);
  }
}

/** Dispatches `change` after each look. Looks only while the page is visible. */
export class Live extends EventTarget {
  metrics = null;
  cache = null;
  failure = null;
  isLocked = true; // whether the cache may not be seen
  isHurried = false;
  #timer = null;

  start() {
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
    return this.look();
  }

  /** Looks often while something happens that somebody watches. */
  hurry(isHurried) {
    this.isHurried = isHurried;
    return this.look();
  }

  async look() {
    clearTimeout(this.#timer);
    const failures = await Promise.all([this.#lookAtMetrics(), this.#lookAtCache()]);
    this.failure = failures.find((failure) => failure !== null) ?? null;
    this.dispatchEvent(new Event("change"));
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.look(), this.isHurried ? HURRIED_MILLISECONDS : CALM_MILLISECONDS);
  }

  /** What went wrong, or null. */
  async #lookAtMetrics() {
    try {
      this.metrics = new Metrics(await metricsText());
      return null;
    } catch (error) {
      return error;
    }
  }

  /** The same. What was seen last stays unless the key is gone or refused, after which nothing would renew it. */
  async #lookAtCache() {
    const asked = adminKey.value;
    let seen = null;
    let failure = null;
    try {
      if (asked) seen = await call("GET", "admin/cache", { key: adminKey });
    } catch (error) {
      failure = error;
    }
    if (adminKey.value !== asked) return null; // another look asks with the key of now
    this.isLocked = !asked || (failure?.isRefusal ?? false);
    if (this.isLocked || failure === null) this.cache = seen;
    return this.isLocked ? null : failure;
  }
}
