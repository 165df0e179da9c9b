// Gets files to the server under their digests. Knows files and progress; not what they are registered as.
import { upload, RequestFailed } from "./server.js";

const MAX_BYTES = 1024 ** 3; // the browser hashes a file in one piece, which has to fit its memory

/** The files' digests, in order. `onProgress({text, share})` hears how far it is. */
export async function uploadAll(files, { onProgress, signal }) {
  checkAll(files);
  const total = files.reduce((bytes, file) => bytes + file.size, 0);
  const digests = [];
  let before = 0;
  for (const [place, file] of files.entries()) {
    const which = `${file.name} (${place + 1} of ${files.length})`;
    onProgress({ text: `Computing the digest of ${which}`, share: before / total });
    const digest = await digestOf(file);
    signal.throwIfAborted();
    const tell = (bytes) => onProgress({ text: `Uploading ${which}`, share: (before + bytes) / total });
    tell(0);
    await upload(file, digest, { onProgress: tell, signal });
    before += file.size;
    digests.push(digest);
  }
  onProgress({ text: "Verifying and registering", share: 1 });
  return digests;
}

/** Before the first byte is sent. RequestFailed for what no upload can carry. */
function checkAll(files) {
  if (!crypto.subtle) throw refused("This browser computes digests only over HTTPS or on localhost.", "insecure_context");
  for (const file of files) {
    if (!file.size) throw new RequestFailed(`${file.name} is empty.`, { code: "empty_file" });
    if (file.size > MAX_BYTES) throw refused(`${file.name} is too large to be hashed in a browser.`, "file_too_large");
  }
}

async function digestOf(file) {
  const digest = await crypto.subtle.digest("SHA-256", await file.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function refused(message, code) {
  return new RequestFailed(`${message} Use \`brainstacks stacks push\` instead.`, { code });
}
