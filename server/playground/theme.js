// The colour scheme that was chosen here, or the system's. Knows no more; runs before the page is painted.
"use strict";

(() => {
  /** What `use` gives, or null where the browser blocks site data: the choice then lasts as long as the page. */
  const inLocalStorage = (use) => {
    try {
      return use(localStorage);
    } catch (error) {
      if (error instanceof DOMException) return null;
      throw error;
    }
  };

  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = inLocalStorage((kept) => kept.getItem("brainstacks.theme"));
  if (chosen) root.dataset.theme = chosen;

  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => button.setAttribute("aria-pressed", String(isDark()));
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      inLocalStorage((kept) => kept.setItem("brainstacks.theme", root.dataset.theme));
      show();
    });
    system.addEventListener("change", show);
    show();
  });
})();
