// Makes elements and texts. Knows the DOM and units, nothing of this page.

/** A name with a dash, `role` or `for` is an attribute, anything else a property. Children that are false are left out. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== false && child !== null && child !== undefined));
  return made;
}

export const $ = (id) => document.getElementById(id);

/** Before `from` is hidden or removed: a focus within it would fall back to the start of the page. */
export function passFocus(from, to) {
  if (from.contains(document.activeElement)) to.focus({ preventScroll: true });
}

/** Gives an element, and what is in it, the colour of a domain; `hue` in degrees. */
export function hued(made, hue) {
  made.classList.add("hued");
  made.style.setProperty("--hue", hue);
  return made;
}

/** Text that only screen readers find. */
export function unseen(text) {
  return element("span", { className: "hidden", textContent: text });
}

export function chip(text, kind = "") {
  return element("span", { className: `chip ${kind}`, textContent: text });
}

export function inBytes(bytes) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= size) return `${(bytes / size).toFixed(bytes >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${bytes} B`;
}

export function inSeconds(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  return `${seconds < 0.01 ? (seconds * 1000).toFixed(1) : Math.round(seconds * 1000)} ms`;
}

export function counted(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

export function inPercent(share) {
  return `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}
