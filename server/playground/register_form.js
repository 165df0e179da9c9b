// Registers or replaces a domain, from files of this computer or paths on the server. Knows one form and its progress.
import { counted, element, inBytes, passFocus } from "./dom.js";
import { failureBox } from "./failure_box.js";
import { adminKey, call, RequestFailed } from "./server.js";
import { uploadAll } from "./uploads.js";

/** Dispatches `change` when the store has changed. */
export class RegisterForm extends EventTarget {
  #files = [];
  #running = null;
  #from = null; // what had the focus when it began

  /** `domains` tells which names are taken and which generation was seen. */
  constructor(holder, { domains }) {
    super();
    this.domains = domains;
    this.name = element("input", { id: "domain-name", type: "text", autocomplete: "off", spellcheck: false, required: true });
    this.fileInput = element("input", { id: "stack-files", type: "file", multiple: true, accept: ".safetensors" });
    this.paths = element("textarea", { id: "stack-paths", rows: 2, spellcheck: false, placeholder: "law/1.safetensors" });
    this.order = element("ol", { className: "rounds" });
    this.sources = [["upload", "Files of this computer"], ["path", "Paths under the server's import root"]].map(([value, text]) =>
      element("label", {}, element("input", { type: "radio", name: "source", value, checked: value === "upload", onchange: () => this.#showSource() }), element("span", { textContent: text })));
    this.uploadPart = element("div", { className: "field" }, element("label", { for: "stack-files", textContent: "Stack files, one a round" }), this.fileInput, this.order);
    this.pathPart = element("div", { className: "field" }, element("label", { for: "stack-paths", textContent: "Paths, one a line, in the order of the rounds" }), this.paths);
    this.submit = element("button", { type: "submit", className: "primary", textContent: "Register" });
    this.check = element("button", { type: "button", textContent: "Check only", onclick: () => this.#run({ isDry: true }) });
    this.stop = element("button", { type: "button", textContent: "Cancel", hidden: true, onclick: () => this.#running?.abort() });
    this.progressText = element("label", { for: "upload-progress" });
    this.progress = element("progress", { id: "upload-progress", max: 1, value: 0 });
    this.progressPart = element("div", { className: "progress", hidden: true }, this.progressText, this.progress);
    this.said = element("div", { role: "status" });
    this.form = element("form", { className: "register", autocomplete: "off", tabIndex: -1 },
      element("div", { className: "field" }, element("label", { for: "domain-name", textContent: "Name" }), this.name),
      element("fieldset", { className: "segments wide" }, element("legend", { className: "hidden", textContent: "Where the files are" }), ...this.sources),
      this.uploadPart, this.pathPart, this.progressPart,
      element("div", { className: "actions" }, this.submit, this.check, this.stop), this.said);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run({ isDry: false });
    });
    this.fileInput.addEventListener("change", () => this.#take([...this.fileInput.files]));
    this.name.addEventListener("input", () => this.#showVerb());
    holder.append(this.form);
    this.#showSource();
  }

  /** Begins a replacement, unless another domain is being sent. */
  fill(name) {
    this.form.scrollIntoView({ block: "nearest" });
    if (this.#running) return;
    this.name.value = name;
    this.#showVerb();
    this.said.replaceChildren();
    this.fileInput.focus();
  }

  #isUpload() {
    return this.sources[0].firstChild.checked;
  }

  #showSource() {
    this.uploadPart.hidden = !this.#isUpload();
    this.pathPart.hidden = this.#isUpload();
  }

  #showVerb() {
    this.submit.textContent = this.domains.has(this.name.value.trim()) ? "Replace" : "Register";
  }

  #take(files) {
    this.#files = files.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
    this.#showOrder();
  }

  #showOrder() {
    this.order.replaceChildren(...this.#files.map((file, place) => element("li", {},
      element("span", { className: "name", textContent: file.name }), element("span", { className: "faint", textContent: inBytes(file.size) }),
      place > 0 && element("button", { type: "button", textContent: "Earlier", "aria-label": `${file.name} one round earlier`, onclick: () => this.#moveUp(place) }))));
  }

  #moveUp(place) {
    const [file] = this.#files.splice(place, 1);
    this.#files.splice(place - 1, 0, file);
    this.#showOrder();
    (this.order.children[place - 1].querySelector("button") ?? this.order.querySelector("button"))?.focus();
  }

  async #run({ isDry }) {
    if (this.#running || !this.form.reportValidity()) return;
    const name = this.name.value.trim();
    this.said.replaceChildren();
    this.#running = new AbortController();
    this.#setBusy(true);
    try {
      const stacks = this.#isUpload() ? await this.#uploaded() : this.#named();
      if (!stacks.length) throw new RequestFailed(this.#isUpload() ? "Choose at least one stack file." : "Name at least one path.", { code: "no_stacks" });
      passFocus(this.stop, this.form);
      this.stop.hidden = true; // nobody can take back what the server is asked now
      const { generation } = this.domains;
      if (generation === undefined) throw new RequestFailed("The key was forgotten meanwhile; the store is as it was.", { code: "invalid_api_key" });
      const path = `admin/domains/${encodeURIComponent(name)}`;
      const answer = await call("PUT", path, { key: adminKey, body: { stacks, dry_run: isDry }, generation });
      this.#say(told(answer));
      if (!isDry) this.#reset();
    } catch (error) {
      if (error.name === "AbortError") this.#say("Cancelled; the store is as it was.");
      else this.said.replaceChildren(failureBox(error, { forAdmin: true }));
    } finally {
      this.#running = null;
      this.#setBusy(false);
      this.dispatchEvent(new Event("change"));
    }
  }

  async #uploaded() {
    if (!this.#files.length) return [];
    const show = ({ text, share }) => {
      this.progressText.textContent = text;
      this.progress.value = share;
    };
    const digests = await uploadAll([...this.#files], { onProgress: show, signal: this.#running.signal });
    return digests.map((sha256) => ({ sha256 }));
  }

  #named() {
    return this.paths.value.split("\n").map((path) => path.trim()).filter(Boolean).map((path) => ({ path }));
  }

  #setBusy(isBusy) {
    const hadFocus = this.form.contains(document.activeElement);
    if (isBusy) this.#from = document.activeElement;
    for (const control of this.form.elements) control.disabled = isBusy && control !== this.stop; // what is sent stays in sight
    this.stop.hidden = !isBusy;
    this.progressPart.hidden = !isBusy || !this.#isUpload();
    this.form.setAttribute("aria-busy", String(isBusy));
    if (hadFocus) (isBusy ? this.stop : this.#from).focus();
  }

  #say(text) {
    this.said.replaceChildren(element("p", { textContent: text }));
  }

  #reset() {
    this.form.reset();
    this.#files = [];
    this.#showOrder();
    this.#showSource();
    this.#showVerb();
  }
}

function told(answer) {
  const what = `${answer.name}, ${counted(answer.stacks.length, "round")}, ${inBytes(answer.bytes)}, version ${answer.version.slice(0, 8)}`;
  if (answer.dry_run) return `Valid: ${what}. Nothing was changed.`;
  return answer.changed ? `Registered: ${what}; the store is at generation ${answer.generation}.` : `Nothing to change: ${what} is registered already.`;
}
