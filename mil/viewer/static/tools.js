// The bar above the slide: what all panes have in common.

import { el } from "./el.js";
import { on, set, state } from "./state.js";

function check(key, text, hint) {
  const box = el("input", { type: "checkbox", checked: !!state[key], name: key });
  box.addEventListener("change", () => set({ [key]: box.checked ? 1 : 0 }));
  on([key], () => (box.checked = !!state[key]));
  return el("label", { title: hint }, box, text);
}

function slider(key, text, { min, max, step }, shown) {
  const value = el("span", { className: "value" });
  const box = el("input", { type: "range", name: key, min, max, step, "aria-label": text });
  const show = () => {
    box.value = state[key] === "" ? min : state[key];
    value.textContent = shown(state[key]);
  };
  box.addEventListener("input", () => set({ [key]: Number(box.value) }));
  on([key], show);
  show();
  return el("label", {}, text, box, value);
}

function number(key, text) {
  const box = el("input", { type: "number", step: "any", className: "number", name: key, "aria-label": text, placeholder: text, value: state[key] });
  box.addEventListener("change", () => set({ [key]: box.value }));
  on([key], () => (box.value = state[key]));
  return box;
}

/** buttons: what else can be done. scored: whether there are runs, and so scores. ends(): the colours' ends just now. */
export function makeTools(root, { scored, exclude, buttons, ends }) {
  if (scored) {
    const scale = el("select", { name: "scale", "aria-label": "Scale of the colours" }, el("option", { value: "percentile", textContent: "percentile" }), el("option", { value: "raw", textContent: "raw score" }));
    const show = () => {
      scale.value = state.scale;
      for (const part of raw) part.hidden = state.scale !== "raw";
      for (const part of limits) part.hidden = state.scale !== "raw" || !state.fixed;
      percent.hidden = state.scale === "raw";
      least.hidden = state.scale !== "raw";
    };
    scale.addEventListener("change", () => set({ scale: scale.value, threshold: "" }));
    const fixed = check("fixed", "same for all slides", "Keep these ends of the colours when another slide is opened");
    fixed.firstChild.addEventListener("change", () => state.fixed && state.low === "" && ends() && set({ low: ends()[0], high: ends()[1] }));
    const limits = [number("low", "lowest"), number("high", "highest")];
    const raw = [fixed];
    const percent = slider("threshold", "From", { min: 0, max: 100, step: 1 }, (value) => (value === "" || value === 0 ? "all" : String(value)));
    const least = el("label", {}, "From", number("threshold", "lowest shown"));
    root.append(check("heat", "Heatmap", "h"), slider("opacity", "Opacity", { min: 0, max: 1, step: 0.05 }, (value) => `${Math.round(value * 100)} %`), el("label", {}, "Scale", scale), fixed, ...limits, percent, least);
    on(["scale", "fixed"], show);
    show();
  }
  root.append(check("outlines", "Outlines", "o"), check("tissue", exclude ? "Tissue and regions" : "Tissue", "t"), check("grid", "Grid", "g"), ...buttons);
}
