// Keys for everything that is done often; none while somebody types.

import { el } from "./el.js";

export const HELP = [
  ["↑ ↓ (in the list), j k", "next and previous slide"],
  ["h o t g", "heatmap, outlines, tissue, grid on and off"],
  ["1 2 3", "review: wrong label, bad quality, look again"],
  ["[ ]", "highest tiles one after the other"],
  ["arrows, + −, 0 (in the slide)", "move, zoom, show all of it"],
  ["s", "side by side"],
  ["Escape", "stop drawing"],
  ["?", "these keys"],
];

export function listen(actions) {
  addEventListener("keydown", (event) => {
    const { target } = event;
    const typing = target instanceof HTMLInputElement && !["checkbox", "range"].includes(target.type);
    if (typing || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement || event.ctrlKey || event.metaKey || event.altKey) return;
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

export function helpDialog() {
  const rows = HELP.map(([keys, what]) => el("tr", {}, el("td", {}, el("kbd", { textContent: keys })), el("td", { textContent: what })));
  const close = el("button", { type: "submit", textContent: "Close" });
  return el("dialog", { "aria-label": "Keys" }, el("h2", { textContent: "Keys" }), el("table", {}, ...rows), el("form", { method: "dialog" }, close));
}
