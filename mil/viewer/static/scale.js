// Lengths and magnification of a view.

import { el } from "./el.js";

/** The largest of 1, 2, 5, 10, 20, 50, ... that is not longer. */
export function roundLength(microns) {
  const power = 10 ** Math.floor(Math.log10(microns));
  return Math.max(...[1, 2, 5].map((step) => step * power).filter((length) => length <= microns * (1 + 1e-9)));
}

export class ScaleBar {
  constructor() {
    this.bar = el("div", { className: "bar" });
    this.text = el("div");
    this.root = el("div", { className: "scale" }, this.bar, this.text);
  }

  /** mpp: microns per pixel of the screen. */
  show(mpp) {
    if (!mpp) {
      this.text.textContent = "scale unknown";
      this.bar.style.width = "0";
      return;
    }
    const microns = roundLength(120 * mpp);
    this.bar.style.width = `${microns / mpp}px`;
    const length = microns >= 1000 ? `${microns / 1000} mm` : `${Number(microns.toPrecision(1))} µm`;
    this.text.textContent = `${length} · ${magnification(mpp)}`;
  }
}

/** As microscopes are spoken of: 10 microns per pixel at 1x, so 0.25 at 40x. */
export function magnification(mpp) {
  const times = 10 / mpp;
  return `${times >= 10 ? times.toFixed(0) : Number(times.toPrecision(2))}×`;
}
