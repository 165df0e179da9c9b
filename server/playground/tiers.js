// Shows what lies in each memory tier and how often it was found there. Knows cache snapshots and counters.
import { chip, counted, element, hued, inBytes, inPercent, inSeconds } from "./dom.js";

const MAX_ROWS = 24;
const LOCKED = "Which domains these are, and which are leased or pinned, needs the admin key.";
const UNTOLD = "Which domains these are, the server did not tell.";

/** `device`, and `host` where there is one: bytes from the cache's snapshot if it may be seen, else from the counters. */
function tiersOf({ metrics, cache }) {
  const names = new Set([...metrics.tiers, ...(cache?.host ? ["host"] : [])]);
  return [...names].map((name) => {
    const snapshot = name === "device" ? cache : cache?.[name];
    const hits = metrics.sum("stack_cache_lookups_total", { tier: name, result: "hit" });
    const misses = metrics.sum("stack_cache_lookups_total", { tier: name, result: "miss" });
    return {
      name,
      snapshot: snapshot ?? null,
      budget: snapshot?.budget_bytes ?? metrics.sum("stack_cache_budget_bytes", { tier: name }),
      resident: snapshot?.resident_bytes ?? metrics.sum("stack_cache_resident_bytes", { tier: name }),
      evictions: metrics.sum("stack_cache_evictions_total", { tier: name }),
      hits,
      misses,
    };
  });
}

/** A line per tier: a bar and the hit rate. */
export function tierSummaries(live, facts) {
  return tiersOf(live).map((tier) => element("div", { className: "tier" }, tierHead(tier), tierBar(tier, facts),
    element("p", { className: "figures", textContent: hitRate(tier) })));
}

/** The same with every entry and its state. `isRegistered(key)` tells a version that is current from one that drains. */
export function tierDetails(live, facts, isRegistered) {
  return tiersOf(live).map((tier) => {
    const parts = [tierHead(tier), tierBar(tier, facts)];
    parts.push(tierFigures(tier));
    if (tier.snapshot) parts.push(...entries(tier.snapshot, facts, isRegistered));
    else parts.push(element("p", { className: "note", textContent: live.isLocked ? LOCKED : UNTOLD }));
    return element("section", { className: "tier", "aria-label": `${tier.name} tier` }, ...parts);
  });
}

/** What the server does right now, from counters that need no key. */
export function trafficList({ metrics }) {
  const loads = metrics.sum("stack_load_seconds_count");
  const facts = [
    ["Running", metrics.sum("requests_running")],
    ["Waiting", metrics.sum("requests_waiting")],
    ["KV cache", inPercent(metrics.sum("kv_cache_used_ratio"))],
    ["Tokens", metrics.sum("completion_tokens_total").toLocaleString("en")],
    ["Loads", loads.toLocaleString("en")],
    ["Mean load", loads ? inSeconds(metrics.sum("stack_load_seconds_sum") / loads) : "–"],
    ["Bytes read", inBytes(metrics.sum("stack_load_bytes_total"))],
    ["Gaps", metrics.sum("capability_gap_total").toLocaleString("en")],
  ];
  return statList(facts);
}

export function stateChips(entry, { drains = false, isInHost = false } = {}) {
  if (!entry) return [chip(isInHost ? "in host memory" : "on disk")];
  return [
    chip(entry.state, entry.state),
    entry.leases > 0 && chip(`leased ${entry.leases}×`, "leased"),
    entry.pinned && chip("pinned", "pinned"),
    drains && chip("draining", "warn"),
  ].filter(Boolean);
}

function tierHead(tier) {
  return element("p", { className: "tier-head" }, element("b", { textContent: tier.name }),
    element("span", { textContent: `${inBytes(tier.resident)} of ${inBytes(tier.budget)}` }));
}

function tierBar(tier, facts) {
  const parts = tier.snapshot?.entries ?? (tier.resident ? [{ key: "", bytes: tier.resident, state: "resident" }] : []);
  const label = `${tier.name}: ${inBytes(tier.resident)} of ${inBytes(tier.budget)} used`;
  return element("div", { className: "tier-bar", role: "img", "aria-label": label }, ...parts.map((entry) => {
    const part = element("i", { className: `${entry.state} ${entry.leases ? "held" : ""} ${entry.pinned ? "pinned" : ""}` });
    part.style.width = `${(entry.bytes / tier.budget) * 100}%`;
    return entry.key ? hued(part, facts.hue(domainOf(entry.key))) : part;
  }));
}

function tierFigures(tier) {
  const facts = [["Hit rate", hitShare(tier)], ["Hits", tier.hits], ["Misses", tier.misses], ["Evictions", tier.evictions]];
  if (tier.snapshot) {
    const loading = tier.snapshot.entries.filter((entry) => entry.state === "loading").length;
    facts.push(["Leased", inBytes(tier.snapshot.leased_bytes)], ["Pinned", inBytes(tier.snapshot.pinned_bytes)],
      ["Loading", loading], ["Waiting", tier.snapshot.waiting]);
  }
  return statList(facts);
}

function statList(facts) {
  return element("dl", { className: "stats" }, ...facts.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

function entries(snapshot, facts, isRegistered) {
  const newestFirst = [...snapshot.entries].sort((a, b) => b.leases - a.leases || b.last_used - a.last_used);
  if (!newestFirst.length) return [element("p", { className: "note", textContent: "Nothing is resident." })];
  const list = element("ul", { className: "entries", role: "list" }, ...newestFirst.slice(0, MAX_ROWS).map((entry) => {
    const [domain, version = ""] = entry.key.split("@");
    const item = element("li", {}, element("span", { className: "dot name", textContent: domain }),
      element("code", { className: "faint", textContent: version.slice(0, 8) }),
      element("span", { className: "chips" }, ...stateChips(entry, { drains: !isRegistered(entry.key) })),
      element("span", { className: "number", textContent: inBytes(entry.bytes) }));
    return hued(item, facts.hue(domain));
  }));
  const rest = newestFirst.length - MAX_ROWS;
  return [list, rest > 0 && element("p", { className: "note", textContent: `and ${rest} more` })];
}

function hitShare({ hits, misses }) {
  return hits + misses ? inPercent(hits / (hits + misses)) : "–";
}

function hitRate(tier) {
  const asked = tier.hits + tier.misses;
  return asked ? `hit rate ${hitShare(tier)}: ${tier.hits.toLocaleString("en")} of ${counted(asked, "look-up")}` : "nothing looked up yet";
}

function domainOf(key) {
  return key.slice(0, key.lastIndexOf("@"));
}
