// Shows who answered: domains as bars with raw score, weight, threshold and floor, then the phases. Knows one report.
import { chip, counted, element, hued, inSeconds, unseen } from "./dom.js";

const UNUSED_SHOWN = 4; // beyond this many domains below the threshold, the rest is folded away
const PHASES = [["queue", "queue"], ["route", "route"], ["page_in", "page in"], ["prefill", "prefill"], ["decode", "decode"]];

export function mixReport({ report, usage, finishReason }, facts) {
  return element("div", { className: "report" }, ...mixParts(report, facts), phases(report.seconds), figures(report, usage, finishReason));
}

/** `math 0.97, chat 0.20`, for ears and summaries. */
export function mixInWords(mix) {
  const parts = Object.entries(mix).sort(([, a], [, b]) => b - a).map(([name, weight]) => `${name} ${weight.toFixed(2)}`);
  return parts.length ? parts.join(", ") : "the base alone";
}

function mixParts(report, facts) {
  const rows = rowsOf(report);
  if (!rows.length) return [element("p", { className: "plain", textContent: "Answered by the base alone." })];
  const policy = Object.keys(report.scores).length ? facts.policy : null; // a forced mix asked no router
  const isGap = policy && Object.values(report.scores).every((score) => score < policy.gap_threshold);
  const body = element("tbody", {}, ...rows.map((row) => tableRow(row, policy, facts)));
  const head = element("thead", {}, element("tr", {},
    element("th", { scope: "col", textContent: "domain" }),
    element("th", { scope: "col", className: "scale" }, policy ? thresholdLabel(policy) : unseen("weight as a bar")),
    element("th", { scope: "col", className: "number", textContent: "score" }),
    element("th", { scope: "col", className: "number", textContent: "weight" })));
  const table = element("table", { className: "mix" }, element("caption", { className: "hidden", textContent: "The mix of this answer" }), head, body);
  return [table, unfold(body, rows), isGap && element("p", { className: "note", textContent: "No domain covers this question: every score is below the gap threshold." })];
}

/** Active domains by weight, then the others by score. */
function rowsOf(report) {
  const { scores, mix, dropped = {}, cold } = report;
  const names = [...new Set([...Object.keys(mix), ...Object.keys(dropped), ...Object.keys(scores)])];
  const rows = names.map((name) => ({ name, score: scores[name], weight: mix[name], dropped: dropped[name], isCold: cold.includes(name) }));
  return rows.sort((a, b) => (b.weight ?? -1) - (a.weight ?? -1) || (b.dropped ?? -1) - (a.dropped ?? -1) || (b.score ?? 0) - (a.score ?? 0));
}

function tableRow({ name, score, weight, dropped, isCold }, policy, facts) {
  const isLifted = weight !== undefined && score !== undefined && weight > score;
  const label = element("th", { scope: "row" }, element("span", { className: "name", textContent: name }),
    isCold && chip("cold"), isCold && unseen(", loaded from disk"),
    isLifted && unseen(", lifted to its floor"), dropped !== undefined && chip("no room", "warn"));
  const row = element("tr", { className: weight === undefined ? "unused" : "" }, label,
    element("td", { className: "scale" }, bar({ name, score, weight }, policy)),
    element("td", { className: "number", textContent: shown(score) }),
    element("td", { className: "number weight", textContent: shown(weight) }));
  return hued(row, facts.hue(name));
}

function bar({ name, score, weight }, policy) {
  const track = element("div", { className: "track", "aria-hidden": "true" });
  const fill = (kind, share) => {
    const made = element("i", { className: kind });
    made.style.width = `${Math.min(1, share) * 100}%`;
    track.append(made);
  };
  if (weight !== undefined) fill(score !== undefined && weight > score ? "lift" : "weight", weight);
  if (score !== undefined && (weight === undefined || weight > score)) fill(weight === undefined ? "below" : "weight", score);
  const mark = (kind, share) => {
    const made = element("b", { className: kind });
    made.style.left = `${share * 100}%`;
    track.append(made);
    return made;
  };
  if (policy) mark("threshold", policy.threshold);
  if (policy?.floor_domain === name) {
    mark("floor", policy.floor);
    if (weight === policy.floor) mark("floor-label", policy.floor).textContent = `floor ${policy.floor.toFixed(2)}`;
  }
  return track;
}

function thresholdLabel(policy) {
  const label = element("span", { className: "threshold-label", textContent: `threshold ${policy.threshold.toFixed(2)}` });
  label.style.left = `${policy.threshold * 100}%`;
  const floor = unseen(`; ${policy.floor_domain} has at least ${policy.floor.toFixed(2)}`);
  return element("span", { className: "scale-label" }, label, floor);
}

function unfold(body, rows) {
  const unused = rows.filter((row) => row.weight === undefined);
  if (unused.length <= UNUSED_SHOWN + 1) return null;
  const folded = [...body.rows].slice(rows.length - unused.length + UNUSED_SHOWN);
  for (const row of folded) row.hidden = true;
  const more = `Show ${counted(folded.length, "domain")} more below the threshold`;
  const button = element("button", { type: "button", className: "link", textContent: more });
  button.addEventListener("click", () => {
    for (const row of folded) row.hidden = !row.hidden;
    button.textContent = folded[0].hidden ? more : "Show fewer";
  });
  return button;
}

function phases(seconds) {
  const known = PHASES.filter(([key]) => seconds[key] !== undefined);
  const total = known.reduce((sum, [key]) => sum + seconds[key], 0) || 1;
  const line = element("div", { className: "phase-line", "aria-hidden": "true" }, ...known.map(([key]) => {
    const part = element("i", { className: `phase-${key}` });
    part.style.flexGrow = (100 * seconds[key]) / total; // sums below 1 would leave room
    return part;
  }));
  const list = element("dl", { className: "phases" }, ...known.map(([key, name]) =>
    element("div", {}, element("dt", { className: `phase-${key}`, textContent: name }), element("dd", { textContent: inSeconds(seconds[key]) }))));
  return element("div", {}, line, list);
}

function figures(report, usage, finishReason) {
  const said = [];
  if (usage) {
    said.push(counted(usage.completion_tokens, "token"));
    if (usage.completion_tokens > 1 && report.seconds.decode > 0) {
      said.push(`${((usage.completion_tokens - 1) / report.seconds.decode).toFixed(1)} tokens/s`);
    }
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    said.push(`${usage.prompt_tokens} read${cached ? ` (${cached} reused)` : ""}`);
  }
  if (finishReason === "length") said.push("cut at max tokens");
  return element("p", { className: "figures", textContent: said.join(" · ") });
}

function shown(number) {
  return number === undefined ? "–" : number.toFixed(2);
}
