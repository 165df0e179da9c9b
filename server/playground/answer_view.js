// One answer from its first token to its mix. Knows how it is shown and streamed; not who asked or what comes next.
import { AnswerText } from "./answer_text.js";
import { SpokenAnswer } from "./announcer.js";
import { element } from "./dom.js";
import { failureBox } from "./failure_box.js";
import { mixInWords, mixReport } from "./mix_report.js";
import { streamChat } from "./server.js";

/** Builds its element at once and fills it while `stream` runs. */
export class AnswerView {
  text = new AnswerText();
  succeeded = false;
  failed = false; // neither succeeded nor was stopped

  /** `isOneOfTwo`: another one comes at the same time. */
  constructor(facts, { label = "Answer", title = null, isOneOfTwo = false } = {}) {
    Object.assign(this, { facts, label, isOneOfTwo });
    this.progress = element("p", { className: "figures", textContent: "The mix is being decided…" });
    this.root = element("article", { className: "answer waiting", "aria-label": label, "aria-busy": "true" },
      title && element("p", { className: "side-title", textContent: title }), this.text.root, this.progress);
  }

  /** Ends with the answer, whatever becomes of it. `onGrowth` runs after each piece; `retry` is offered on failure. */
  async stream(body, { signal, onGrowth = () => {}, retry = null }) {
    const onMix = (mix) => { this.progress.textContent = `Answered by ${mixInWords(mix)}`; };
    const spoken = new SpokenAnswer(this.label, { isWhole: this.isOneOfTwo });
    const last = {};
    let summary = "";
    try {
      for await (const chunk of streamChat(body, { signal, onMix })) {
        const [choice] = chunk.choices;
        const piece = choice?.delta?.content;
        if (piece) {
          this.text.add(piece);
          spoken.add(piece);
        }
        last.finishReason = choice?.finish_reason ?? last.finishReason;
        last.report = chunk.brainstacks ?? last.report;
        last.usage = chunk.usage ?? last.usage;
        onGrowth();
      }
      this.succeeded = true;
      this.report = last.report;
      if (last.report) summary = `Mix: ${mixInWords(last.report.mix)}.`;
    } catch (error) {
      this.failed = error.name !== "AbortError";
      this.facts.doubt(error);
      if (this.failed) this.root.append(failureBox(error, { retry }));
      else this.#note("Stopped.");
    }
    this.progress.remove();
    this.text.draw();
    if (this.succeeded && !this.text.value) this.#note("The model answered with no text.");
    if (last.report) this.root.append(mixReport(last, this.facts));
    this.root.classList.remove("waiting");
    this.root.setAttribute("aria-busy", "false");
    spoken.end(summary);
    onGrowth();
  }

  #note(text) {
    this.root.append(element("p", { className: "note", textContent: text }));
  }
}
