// The playground: a chat that shows the mix of every answer. Knows the server's HTTP contract and this page, no more.
"use strict";

const $ = (id) => document.getElementById(id);

const PHONE_WIDTH = "(max-width: 50rem)";

const state = { servedName: "", domains: [], messages: [], running: null };

// ---- asking the server

function headers() {
  const key = $("api-key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function* streamEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const payload = part.replace(/^data: /, "");
      if (payload === "[DONE]") return;
      yield JSON.parse(payload);
    }
  }
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  const names = (await response.json()).data.map((model) => model.id);
  state.servedName = names[0];
  const suffixes = names.slice(1).map((name) => name.slice(state.servedName.length + 1));
  state.domains = suffixes.filter((suffix) => suffix !== "base");
  const chosen = $("model").value;
  $("model").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
  if (names.includes(chosen)) $("model").value = chosen;
  showSliders();
}

function requestBody() {
  const mode = document.querySelector("[name=mode]:checked").value;
  const body = {
    model: $("model").value || undefined,
    messages: state.messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value) || 256,
  };
  if (isRouted() && mode !== "auto") body.brainstacks = mode === "mix" ? { mix: forcedMix() } : { mode };
  return body;
}

function isRouted() {
  return $("model").value === state.servedName;
}

function forcedMix() {
  return Object.fromEntries([...document.querySelectorAll("#sliders input")].map((s) => [s.name, Number(s.value)]));
}

// ---- showing

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function hue(domain) {
  const known = state.domains.indexOf(domain);
  return ((known < 0 ? state.domains.length : known) * 137 + 250) % 360;
}

function addTurn(kind, text) {
  $("hint")?.remove();
  const turn = element("article", { className: `turn ${kind}` }, element("div", { className: "text", textContent: text }));
  $("log").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function isAtEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function bar(domain, score, weight) {
  const track = element("div", { className: "track" });
  track.style.setProperty("--hue", hue(domain));
  for (const [kind, share] of [["score", score], ["weight", weight]]) {
    if (share === undefined) continue;
    const fill = element("i", { className: kind });
    fill.style.width = `${Math.min(1, share) * 100}%`;
    track.append(fill);
  }
  return track;
}

function shown(number) {
  return number === undefined ? "" : number.toFixed(2);
}

function reportTable(report) {
  const dropped = report.dropped ?? {};
  const names = [...new Set([...Object.keys(report.scores), ...Object.keys(report.mix), ...Object.keys(dropped)])];
  if (!names.length) return element("p", { className: "facts", textContent: "Answered by the base alone." });
  const weightOf = (name) => report.mix[name] ?? -1;
  names.sort((a, b) => weightOf(b) - weightOf(a) || (report.scores[b] ?? 0) - (report.scores[a] ?? 0));
  const head = ["domain", "", "score", "weight"].map((name) => element("th", { textContent: name, scope: "col" }));
  head[2].className = head[3].className = "number";
  const rows = names.map((name) => {
    const [score, weight] = [report.scores[name], report.mix[name]];
    const notes = [report.cold.includes(name) && "loaded from disk", name in dropped && "dropped: no room"];
    const label = [name, ...notes.filter(Boolean)].join(", ");
    return element("tr", { className: weight === undefined ? "unused" : "", title: label },
      element("th", { className: "name", scope: "row", textContent: report.cold.includes(name) ? `${name} (cold)` : name }),
      element("td", {}, bar(name, score, weight)),
      element("td", { className: "number", textContent: shown(score) }),
      element("td", { className: "number", textContent: name in dropped ? "dropped" : shown(weight) }));
  });
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}

function facts(report, usage) {
  const phases = [["route", "route"], ["page_in", "page in"], ["queue", "queue"], ["prefill", "prefill"], ["decode", "decode"]];
  const said = phases.filter(([key]) => report.seconds[key] !== undefined)
    .map(([key, name]) => `${name} ${Math.round(report.seconds[key] * 1000)} ms`);
  if (usage) {
    said.push(`${usage.completion_tokens} tokens`);
    if (usage.completion_tokens > 1 && report.seconds.decode > 0) {
      said.push(`${((usage.completion_tokens - 1) / report.seconds.decode).toFixed(1)} tokens/s`);
    }
  }
  return element("p", { className: "facts", textContent: said.join(" · ") });
}

function showSliders() {
  const before = forcedMix();
  $("sliders").replaceChildren(...state.domains.map((domain) => {
    const value = before[domain] ?? 0;
    const output = element("output", { textContent: shown(value) });
    const slider = element("input", { type: "range", name: domain, min: 0, max: 1, step: 0.05, value });
    slider.addEventListener("input", () => { output.textContent = shown(Number(slider.value)); });
    return element("label", {}, domain, output, slider);
  }));
  showMode();
}

function showMode() {
  $("mode").disabled = !isRouted();
  const mode = document.querySelector("[name=mode]:checked").value;
  $("sliders").hidden = mode !== "mix" || !isRouted();
}

// ---- one question

async function ask(question) {
  const messages = state.messages; // a new chat may begin while the answer comes: it is still this chat's
  messages.push({ role: "user", content: question });
  addTurn("asked", question);
  const turn = addTurn("answer waiting", "");
  const text = turn.querySelector(".text");
  let report = null;
  let usage = null;
  state.running = new AbortController();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(requestBody()), signal: state.running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of streamEvents(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const follow = isAtEnd();
      text.textContent += chunk.choices[0]?.delta.content ?? "";
      report = chunk.brainstacks ?? report;
      usage = chunk.usage ?? usage;
      if (follow) turn.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    const said = error.name === "AbortError" ? "Stopped." : error.message;
    turn.append(element("p", { className: "error", textContent: said }));
  } finally {
    state.running = null;
    turn.classList.remove("waiting");
  }
  if (text.textContent) messages.push({ role: "assistant", content: text.textContent });
  else messages.pop();
  if (report) turn.append(element("div", { className: "report" }, reportTable(report), facts(report, usage)));
  turn.scrollIntoView({ block: "end" });
}

async function submit(event) {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || state.running) return;
  $("question").value = "";
  fitQuestion();
  setBusy(true);
  await ask(question);
  setBusy(false);
  $("question").focus();
}

function setBusy(isBusy) {
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
}

function fitQuestion() {
  const question = $("question");
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

function startAfresh() {
  state.running?.abort();
  state.messages = [];
  $("log").replaceChildren();
  $("question").focus();
  tell(loadModels()); // domains may have come or gone
}

async function start() {
  $("options").open = !window.matchMedia(PHONE_WIDTH).matches;
  $("ask").addEventListener("submit", submit);
  $("stop").addEventListener("click", () => state.running?.abort());
  $("question").addEventListener("input", fitQuestion);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });
  $("temperature").addEventListener("input", () => { $("temperature-shown").textContent = $("temperature").value; });
  $("clear").addEventListener("click", startAfresh);
  $("model").addEventListener("change", showMode);
  $("api-key").addEventListener("change", () => tell(loadModels()));
  $("mode").addEventListener("change", showMode);
  await tell(loadModels());
  $("question").focus();
}

async function tell(work) {
  try {
    await work;
  } catch (error) {
    addTurn("answer", "").append(element("p", { className: "error", textContent: error.message }));
  }
}

start();
