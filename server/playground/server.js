// Asks the server. Knows its HTTP contract and the two keys, which live as long as this tab; not what is shown.

const NOT_IN_HEADERS = /[^\t\x20-\x7e\x80-\xff]/u;

/** What went wrong, in the server's own words and with its code. */
export class RequestFailed extends Error {
  constructor(message, { status = 0, code = "network", requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId });
  }

  get isAboutKey() {
    return this.code === "invalid_api_key" || this.status === 401;
  }

  /** Whether the same key would be refused again. */
  get isRefusal() {
    return this.isAboutKey || this.status === 403;
  }
}

/** What `use` gives, or null where the browser keeps nothing for this page: it may block site data, and even looking fails. */
function inSessionStorage(use) {
  try {
    return use(sessionStorage);
  } catch (error) {
    if (error instanceof DOMException) return null;
    throw error;
  }
}

/** A key that is kept in this tab's session storage only, and where there is none, until the page is left. */
class Key {
  #value;

  constructor(name, title) {
    this.name = `brainstacks.${name}`;
    this.title = title;
    this.#value = inSessionStorage((kept) => kept.getItem(this.name)) ?? "";
  }

  get value() {
    return this.#value;
  }

  set value(key) {
    this.#value = key;
    inSessionStorage((kept) => (key ? kept.setItem(this.name, key) : kept.removeItem(this.name)));
  }

  /** RequestFailed with a key that no header can carry. */
  get headers() {
    const stranger = NOT_IN_HEADERS.exec(this.value)?.[0];
    if (stranger) throw new RequestFailed(`The ${this.title} holds “${stranger}”, a character that HTTP cannot carry.`, { code: "invalid_api_key" });
    return this.value ? { authorization: `Bearer ${this.value}` } : {};
  }
}

export const apiKey = new Key("api-key", "API key");
export const adminKey = new Key("admin-key", "admin key");

/** The JSON of an answer. RequestFailed; AbortError if the signal says so. */
export async function call(method, path, { key = apiKey, body, generation, signal } = {}) {
  const response = await send(method, path, { key, body, generation, signal });
  return response.json();
}

export async function metricsText() {
  return (await send("GET", "metrics", { key: null })).text();
}

/** The chunks of a streamed chat; `onMix` hears the mix before the first. An error within the stream and its early end are RequestFailed. */
export async function* streamChat(body, { signal, onMix }) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("POST", "v1/chat/completions", { key: apiKey, body: asked, signal });
  onMix(readMix(response.headers.get("x-brainstacks-mix") ?? ""));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await nextOf(reader);
    if (done) throw new RequestFailed("The answer ended before it was complete.", { code: "stream_broken" });
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const payload = event.replace(/^data: /, "");
      if (payload === "[DONE]") return;
      const chunk = JSON.parse(payload);
      if (chunk.error) throw failureOf(response, chunk);
      yield chunk;
    }
  }
}

async function nextOf(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestFailed("The connection broke before the answer was complete.");
  }
}

/** Sends a file under its digest. `onProgress` hears the bytes sent so far. */
export function upload(file, digest, { onProgress, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell how far an upload is
    request.open("PUT", `admin/blobs/${digest}`);
    request.setRequestHeader("authorization", adminKey.headers.authorization ?? "");
    request.responseType = "json";
    request.upload.addEventListener("progress", (event) => onProgress(event.loaded));
    request.addEventListener("load", () => {
      if (request.status < 400) resolve(request.response);
      else reject(failureOf({ status: request.status, headers: { get: (name) => request.getResponseHeader(name) } }, request.response));
    });
    request.addEventListener("error", () => reject(new RequestFailed("The connection broke during the upload.")));
    request.addEventListener("abort", () => reject(new DOMException("upload stopped", "AbortError")));
    signal.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}

/** `chat=0.20,math=0.97` as an object; `base` is an empty one. */
function readMix(header) {
  const weights = header.split(",").map((part) => part.split("=")).filter(([, weight]) => weight !== undefined);
  return Object.fromEntries(weights.map(([name, weight]) => [name, Number(weight)]));
}

async function send(method, path, { key, body, generation, signal }) {
  const headers = { ...key?.headers };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (generation !== undefined) headers["if-match"] = `"${generation}"`;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestFailed("The server does not answer. Is it running?");
  }
  if (!response.ok) throw failureOf(response, await response.json().catch(() => null));
  return response;
}

function failureOf(response, body) {
  const { message = `The server answered with status ${response.status}.`, code = "unknown" } = body?.error ?? {};
  const status = body?.error && response.status < 400 ? 0 : response.status; // an error within a stream came after its 200
  return new RequestFailed(message, { status, code, requestId: response.headers.get("x-request-id") });
}
