// Asks before what cannot be taken back. Knows the one dialog of the page.
import { $ } from "./dom.js";

/** Whether somebody said yes. The browser gives the focus back to where it was. */
export function confirmed({ question, consequence, yes }) {
  const dialog = $("confirm");
  $("confirm-question").textContent = question;
  $("confirm-consequence").textContent = consequence;
  $("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
