// Keeps the newest line in sight while somebody is at the end of a log, and stays put when they have scrolled away.
const NEAR_END_PIXELS = 80;

export class LogScroll {
  #sticks = true;

  constructor(root) {
    this.root = root;
    root.addEventListener("scroll", () => {
      this.#sticks = root.scrollHeight - root.scrollTop - root.clientHeight < NEAR_END_PIXELS;
    });
  }

  toEnd() {
    this.#sticks = true;
    this.follow();
  }

  follow() {
    if (this.#sticks) requestAnimationFrame(() => this.root.scrollTo({ top: this.root.scrollHeight }));
  }
}
