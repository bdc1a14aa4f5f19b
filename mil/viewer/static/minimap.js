// The whole slide, small, with the heatmap and a frame around what is in view.

import { clamp, el } from "./el.js";

const LONGEST = 170;

export class Minimap {
  constructor(go) {
    this.root = el("canvas", { className: "mini", role: "img", "aria-label": "The whole slide, with a frame around what is in view" });
    this.root.addEventListener("pointerdown", (event) => {
      this.root.setPointerCapture(event.pointerId);
      this.#go(event, go);
    });
    this.root.addEventListener("pointermove", (event) => event.buttons && this.#go(event, go));
  }

  open(number, info, hasFile) {
    this.info = info;
    const shrink = LONGEST / Math.max(info.width, info.height);
    [this.root.width, this.root.height] = [Math.max(1, Math.round(info.width * shrink)), Math.max(1, Math.round(info.height * shrink))];
    this.image = null;
    if (!hasFile) return;
    const image = new Image();
    image.onload = () => {
      this.image = image;
      this.redraw?.();
    };
    image.src = `slide/${number}/thumb.jpg`;
  }

  #go(event, go) {
    const box = this.root.getBoundingClientRect();
    go(clamp((event.clientX - box.left) / box.width, 0, 1) * this.info.width, clamp((event.clientY - box.top) / box.height, 0, 1) * this.info.height);
  }

  draw(raster, opacity, view) {
    const context = this.root.getContext("2d");
    const scale = this.root.width / this.info.width;
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, this.root.width, this.root.height);
    if (this.image) context.drawImage(this.image, 0, 0, this.root.width, this.root.height);
    if (raster) {
      context.globalAlpha = opacity;
      context.imageSmoothingEnabled = true;
      context.drawImage(raster.canvas, raster.left * scale, raster.top * scale, raster.width * raster.step * scale, raster.height * raster.step * scale);
      context.globalAlpha = 1;
    }
    context.strokeStyle = "#c8142c";
    context.lineWidth = 1.5;
    context.strokeRect(view.x * scale, view.y * scale, Math.max(2, view.width * scale), Math.max(2, view.height * scale));
  }
}
