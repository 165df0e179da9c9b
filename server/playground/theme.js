// The colour scheme that was chosen here, or the system's. Knows no more; runs before the page is painted.
"use strict";

(() => {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = localStorage.getItem("brainstacks.theme");
  if (chosen) root.dataset.theme = chosen;

  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => button.setAttribute("aria-pressed", String(isDark()));
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      localStorage.setItem("brainstacks.theme", root.dataset.theme);
      show();
    });
    system.addEventListener("change", show);
    show();
  });
})();
