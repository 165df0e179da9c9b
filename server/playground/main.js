// Puts the page together: views, composer, settings. Knows every part, and what runs now.
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { $, counted, element, passFocus } from "./dom.js";
import { failureBox } from "./failure_box.js";
import { Live } from "./live.js";
import { MixPicker } from "./mix_picker.js";
import { apiKey } from "./server.js";
import { ServerFacts } from "./server_facts.js";
import { StoreView } from "./store_view.js";
import { tierSummaries } from "./tiers.js";

const VIEWS = ["chat", "compare", "store"];
const NARROW = window.matchMedia("(max-width: 60rem)");
const EXAMPLES = [
  "A box holds 12 eggs. How many eggs are in 7 boxes?",
  "What is diabetes?",
  "Can you explain step by step why 17 is a prime number?",
];

const facts = new ServerFacts();
const live = new Live();
const picker = new MixPicker($("chat-mix"), { name: "chat-mix", facts });
const chat = new Chat({ facts, picker, sampling });
const compare = new Compare({ facts, sampling });
const store = new StoreView({ facts, live });
let view = "chat";
let running = null; // {asker, controller} of the answer that comes

function sampling() {
  return { temperature: Number($("temperature").value), max_tokens: $("max-tokens").valueAsNumber || undefined };
}

// ---- views

function showView() {
  const wanted = location.hash.slice(1);
  if (VIEWS.includes(wanted)) view = wanted; // another hash is a place within the view
  document.body.dataset.view = view;
  for (const part of document.querySelectorAll("[data-view-of]")) part.hidden = !part.dataset.viewOf.split(" ").includes(view);
  for (const link of document.querySelectorAll("[data-goes-to]")) {
    if (link.dataset.goesTo === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $("new-chat").textContent = view === "compare" ? "Clear" : "New chat";
  if (view === "store") store.open();
  showSettings();
  hurryIfWatched();
}

function hurryIfWatched() {
  live.hurry(view === "store" || running !== null);
}

function fitSettings() {
  $("settings").open = !NARROW.matches;
  for (const id of ["side-a", "side-b"]) $(id).open = !NARROW.matches;
}

// ---- asking

/** Whether it is asked: not while another answer comes, nor before the server told its model. Does not wait for the answer. */
async function ask(question) {
  if (!question.trim() || running) return false;
  running = { asker: askerInView(), controller: new AbortController() };
  const { asker, controller: { signal } } = running;
  setBusy(true);
  const isAsked = (facts.model !== null || await learn()) && !signal.aborted;
  if (isAsked) asker.ask(question.trim(), { signal, retry: ask }).finally(finish);
  else finish();
  return isAsked;
}

function finish() {
  running = null;
  setBusy(false);
}

function setBusy(isBusy) {
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  if (hadFocus) $(isBusy ? "stop" : "question").focus();
  hurryIfWatched();
}

async function submit(event) {
  event.preventDefault();
  const question = $("question").value;
  if (!await ask(question) || $("question").value !== question) return;
  $("question").value = "";
  fitQuestion();
}

/** Whether the key belongs to an input method. Safari ends the composition before it tells the key, so that only its code is left. */
function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

function fitQuestion() {
  const question = $("question");
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

function askerInView() {
  return view === "compare" ? compare : chat;
}

/** Ends what is being answered here; the other view's answer goes on. */
function clear() {
  if (running?.asker === askerInView()) running.controller.abort();
  askerInView().clear();
  $("question").focus();
  learn(); // domains and router may have changed since the page was opened
}

// ---- what the server is

/** Whether the server told. What went wrong is shown where answers appear. */
async function learn() {
  try {
    await facts.refresh();
    dropServerFailure($("main"));
    return true;
  } catch (error) {
    const box = failureBox(error, { retry: learn });
    box.classList.add("of-server");
    document.querySelector(".stage").prepend(box);
    dropServerFailure(box.querySelector("button"));
    $("server").textContent = error.isAboutKey ? "needs a key" : "not reached";
    if (error.isAboutKey) {
      $("settings").open = true;
      $("api-key").focus();
    }
    return false;
  }
}

/** All but the newest, whose `next` inherits the focus. */
function dropServerFailure(next) {
  for (const box of document.querySelectorAll(".of-server")) {
    if (box.contains(next)) continue;
    passFocus(box, next);
    box.remove();
  }
}

function showServer() {
  $("server").textContent = `${facts.model.split("/").at(-1)} · ${counted(facts.domains.length, "domain")}`;
  $("server").title = facts.model;
}

function showSettings() {
  $("temperature-shown").textContent = Number($("temperature").value).toFixed(2);
  const parts = [view === "chat" && picker.inWords, `temperature ${$("temperature").value}`, `${$("max-tokens").value} tokens`];
  $("settings-summary").textContent = parts.filter(Boolean).join(" · ");
}

function showMemory() {
  if (live.metrics) $("memory").replaceChildren(...tierSummaries(live, facts));
}

function start() {
  $("examples").append(...EXAMPLES.map((text) => element("li", {}, element("button", { type: "button", textContent: text, onclick: () => ask(text) }))));
  $("composer").addEventListener("submit", submit);
  $("stop").addEventListener("click", () => running?.controller.abort());
  $("new-chat").addEventListener("click", clear);
  $("question").addEventListener("input", fitQuestion);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) submit(event);
  });
  for (const id of ["temperature", "max-tokens"]) $(id).addEventListener("input", showSettings);
  picker.addEventListener("change", showSettings);
  $("api-key").value = apiKey.value;
  $("api-key").addEventListener("change", () => {
    apiKey.value = $("api-key").value.trim();
    learn();
  });
  $("api-key-form").addEventListener("submit", (event) => event.preventDefault());
  facts.addEventListener("change", showServer);
  live.addEventListener("change", showMemory);
  window.addEventListener("hashchange", showView);
  NARROW.addEventListener("change", fitSettings);
  fitSettings();
  showView();
  learn();
  live.start();
  if (view !== "store" && !NARROW.matches) $("question").focus();
}

start();
