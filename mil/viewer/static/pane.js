// One view of the slide: OpenSeadragon below, a canvas with heatmap, areas and frames over it.

/* global OpenSeadragon */

import { clamp, el, short } from "./el.js";
import { Minimap } from "./minimap.js";
import { Raster } from "./raster.js";
import { drawRings, pathOf } from "./rings.js";
import { ScaleBar } from "./scale.js";
import { range } from "./scores.js";
import { exactDrawer, sourceOf } from "./source.js";

const WAITING = "Scores of this member are computed …";
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export class Pane {
  /** moved(pane): the view was moved here, by hand or by a key. hovered(pane, tile). */
  constructor({ moved, hovered }) {
    this.osd = el("div", { className: "osd" });
    this.canvas = el("canvas", { className: "overlay" });
    this.said = el("p", { className: "said", role: "status" });
    this.tip = el("div", { className: "tip", hidden: true });
    this.scale = new ScaleBar();
    this.mini = new Minimap((x, y) => this.look({ x, y, zoom: this.view()?.zoom ?? 1 }));
    this.mini.redraw = () => this.draw();
    this.bar = el("canvas", { width: 256, height: 1 });
    this.barEnds = el("div", { className: "ends" });
    this.barName = el("div");
    this.colourbar = el("div", { className: "colourbar", hidden: true }, this.barName, this.bar, this.barEnds);
    this.stage = el("div", { className: "stage" }, this.osd, this.canvas, this.colourbar, this.scale.root, this.mini.root, this.tip, this.said);
    this.controls = el("div", { className: "layer" });
    this.root = el("div", { className: "pane" }, this.controls, this.stage);
    Object.assign(this, { layer: null, raster: null, values: null, paths: new Map(), selected: -1, hover: -1, drawn: {} });
    this.events = { moved, hovered };
  }

  /** After it is in the page: OpenSeadragon measures its element. */
  begin() {
    this.viewer = OpenSeadragon({
      element: this.osd,
      drawer: exactDrawer(),
      showNavigationControl: false,
      showNavigator: false,
      animationTime: still() ? 0 : 0.5,
      springStiffness: 9,
      immediateRender: true,
      imageLoaderLimit: 6,
      maxImageCacheCount: 120,
      maxZoomPixelRatio: 8,
      minZoomImageRatio: 0.4,
      visibilityRatio: 0.2,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true },
    });
    this.viewer.canvas.setAttribute("aria-label", "Slide: arrow keys move, + and - zoom, 0 shows all of it");
    this.viewer.addHandler("update-viewport", () => this.draw());
    this.viewer.addHandler("resize", () => this.#resized());
    for (const by of ["canvas-drag", "canvas-scroll", "canvas-pinch", "canvas-key", "canvas-double-click"]) this.viewer.addHandler(by, () => (this.whole = false));
    this.viewer.addHandler("animation", () => this.#moves());
    this.viewer.addHandler("tile-load-failed", (event) => event.message !== "Image load aborted" && this.#failed());
    this.stage.addEventListener("pointermove", (event) => this.#hover(event));
    this.stage.addEventListener("pointerleave", () => this.#leave());
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  say(text) {
    this.said.textContent = text;
  }

  /** A slide, at a place (see `view`) or as a whole. */
  open(slide, info, at) {
    this.info = info;
    this.number = slide.number;
    this.whereFailed = false;
    this.whole = !at;
    this.kept = at;
    this.set(null);
    this.paths = new Map();
    this.say("");
    this.mini.open(slide.number, info, slide.file);
    return new Promise((resolve) => {
      this.viewer.addOnceHandler("open", () => {
        if (at) this.look(at, true);
        this.draw();
        resolve();
      });
      this.viewer.open(sourceOf(slide.number, info));
    });
  }

  close() {
    this.viewer.close();
    this.info = null;
    this.set(null);
    this.paths = new Map();
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.mini.root.hidden = true;
  }

  async #failed() {
    if (this.whereFailed) return;
    this.whereFailed = true;
    const response = await fetch(`slide/${this.number}.json`).catch(() => null);
    const said = response && !response.ok ? (await response.json()).problem : "part of the slide cannot be read";
    this.say(`Not shown: ${said}`);
  }

  // --- where it looks ------------------------------------------------------------------------------------------------

  /** Centre in level-0 px, and screen pixels per level-0 px. */
  view() {
    const item = this.viewer.world.getItemAt(0);
    if (!item || !this.info) return null;
    const centre = item.viewportToImageCoordinates(this.viewer.viewport.getCenter(true));
    return { x: centre.x, y: centre.y, zoom: item.viewportToImageZoom(this.viewer.viewport.getZoom(true)) };
  }

  look({ x, y, zoom }, at_once = false) {
    const item = this.viewer.world.getItemAt(0);
    if (!item) return;
    const { viewport } = this.viewer;
    this.whole = false;
    this.kept = { x, y, zoom };
    viewport.zoomTo(item.imageToViewportZoom(zoom), null, at_once || still());
    viewport.panTo(item.imageToViewportCoordinates(new OpenSeadragon.Point(x, y)), at_once || still());
  }

  #moves() {
    if (this.resizing) return;
    this.kept = this.view();
    if (!this.led) this.events.moved(this);
  }

  /** The same place at the same scale, or still the whole slide: OpenSeadragon, whose own step this waits for, keeps
   * neither of a pane that becomes narrower while a slide is opened. */
  #resized() {
    if (this.resizing) return;
    this.resizing = true;
    queueMicrotask(() => {
      this.resizing = false;
      if (this.whole) this.viewer.viewport?.goHome(true);
      else if (this.kept) this.follow(this.kept);
      this.draw();
    });
  }

  /** As another pane looks, without telling anybody. */
  follow(view) {
    this.led = true;
    this.look(view, true);
    this.led = false;
    this.draw();
  }

  fly(tile) {
    const { coords, side } = this.layer;
    const smaller = Math.min(this.stage.clientWidth, this.stage.clientHeight);
    this.selected = tile;
    this.look({ x: coords[2 * tile] + side / 2, y: coords[2 * tile + 1] + side / 2, zoom: clamp(smaller / (3 * side), 0, 2) });
    this.draw();
  }

  // --- what lies over it ---------------------------------------------------------------------------------------------

  /** A layer with scores or without (a grid); null for none. */
  set(layer) {
    if (layer && layer === this.layer) return;
    this.layer = layer;
    this.raster = layer ? new Raster(layer) : null;
    this.boxes = null;
    this.selected = this.hover = -1;
    this.values = null;
    this.colourbar.hidden = true;
  }

  /** The same layer with more members. */
  extend(layer) {
    this.layer = layer;
    if (this.said.textContent === WAITING) this.say("");
  }

  areas(areas) {
    this.paths = pathOf(areas);
    this.draw();
  }

  /** drawn: member, scale, low, high ("" = of this slide), threshold ("" = none), opacity, heat, grid; colours by name. */
  paint(drawn, colours) {
    this.drawn = drawn;
    if (this.layer?.scored && !this.layer.has(drawn.member)) this.say(WAITING); // it comes, see `extend`
    else if (this.layer?.scored) {
      const { member, scale } = drawn;
      this.values = this.layer.values(member, scale);
      const own = range(this.values, scale, this.layer.signed);
      const ends = scale === "raw" && drawn.fixed ? [drawn.low === "" ? own[0] : +drawn.low, drawn.high === "" ? own[1] : +drawn.high] : own;
      const table = colours[scale === "raw" && this.layer.signed ? "PuOr_r" : "viridis"];
      Object.assign(this, { ends, table });
      this.raster.paint(this.values, table, ends, drawn.threshold === "" ? -Infinity : +drawn.threshold);
      this.#showBar(table, ends, scale);
    }
    this.draw();
  }

  #showBar(table, [low, high], scale) {
    const image = new ImageData(256, 1);
    for (let i = 0; i < 256; i++) image.data.set([table[3 * i], table[3 * i + 1], table[3 * i + 2], 255], 4 * i);
    this.bar.getContext("2d").putImageData(image, 0, 0);
    this.barName.textContent = scale === "percentile" ? `${this.layer.name.split(" (")[0]}, percentile within the slide` : this.layer.name;
    this.barEnds.replaceChildren(el("span", { textContent: short(low) }), el("span", { textContent: short(high) }));
    this.colourbar.hidden = !this.drawn.heat;
  }

  draw() {
    const item = this.viewer?.world.getItemAt(0);
    if (!item || !this.info) return;
    const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
    const dense = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * dense)) this.canvas.width = Math.round(width * dense);
    if (this.canvas.height !== Math.round(height * dense)) this.canvas.height = Math.round(height * dense);
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const from = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const to = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(this.info.width, 0));
    const zoom = (to.x - from.x) / this.info.width;
    context.setTransform(zoom * dense, 0, 0, zoom * dense, from.x * dense, from.y * dense);
    this.#layers(context, zoom);
    const seen = { x: -from.x / zoom, y: -from.y / zoom, width: width / zoom, height: height / zoom };
    this.mini.root.hidden = false;
    this.mini.draw(this.values && this.drawn.heat ? this.raster : null, this.drawn.opacity ?? 1, seen);
    this.scale.show(this.info.mpp ? this.info.mpp / zoom : null);
  }

  #layers(context, zoom) {
    const { drawn, raster } = this;
    if (raster && this.values && drawn.heat) {
      context.imageSmoothingEnabled = false;
      context.globalAlpha = drawn.opacity;
      context.drawImage(raster.canvas, raster.left, raster.top, raster.width * raster.step, raster.height * raster.step);
      context.globalAlpha = 1;
    }
    if (raster && drawn.grid && this.layer.side * zoom > 3) this.#grid(context, zoom);
    drawRings(context, this.paths, zoom);
    if (this.hover >= 0) this.#frame(context, this.hover, "#ffffff", 2 / zoom);
    if (this.selected >= 0) this.#frame(context, this.selected, "#c8142c", 3 / zoom);
  }

  #grid(context, zoom) {
    if (!this.boxes) {
      this.boxes = new Path2D();
      const { coords, side, n } = this.layer;
      for (let i = 0; i < n; i++) this.boxes.rect(coords[2 * i], coords[2 * i + 1], side, side);
    }
    context.strokeStyle = "rgb(20 60 200 / 70%)";
    context.lineWidth = 1 / zoom;
    context.stroke(this.boxes);
  }

  #frame(context, tile, colour, width) {
    const { coords, side } = this.layer;
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(coords[2 * tile] - width / 2, coords[2 * tile + 1] - width / 2, side + width, side + width);
  }

  // --- the pointer ---------------------------------------------------------------------------------------------------

  /** Level-0 px of a point of the stage. */
  point(x, y) {
    return this.viewer.world.getItemAt(0)?.viewerElementToImageCoordinates(new OpenSeadragon.Point(x, y));
  }

  #hover(event) {
    if (this.stage.querySelector(".drawing")) return;
    const box = this.stage.getBoundingClientRect();
    const [left, top] = [event.clientX - box.left, event.clientY - box.top];
    const place = this.point(left, top);
    const tiles = place && this.raster ? this.raster.at(place.x, place.y) : [];
    const best = this.values ? tiles.sort((a, b) => this.values[b] - this.values[a])[0] : tiles[0];
    const tile = best ?? -1;
    this.tip.hidden = tile < 0 || event.buttons > 0;
    if (tile >= 0) {
      this.tip.textContent = this.about(tile);
      this.tip.style.left = `${clamp(left + 14, 0, box.width - 190)}px`;
      this.tip.style.top = `${clamp(top + 14, 0, box.height - 90)}px`;
    }
    if (tile === this.hover) return;
    this.hover = tile;
    this.events.hovered(this, tile);
    this.draw();
  }

  #leave() {
    this.tip.hidden = true;
    this.hover = -1;
    this.draw();
  }

  /** The colour of a tile, as CSS has it. */
  colour(tile) {
    const [low, high] = this.ends;
    const place = 3 * clamp(Math.round(((this.values[tile] - low) / Math.max(high - low, 1e-12)) * 255), 0, 255);
    return `rgb(${this.table[place]} ${this.table[place + 1]} ${this.table[place + 2]})`;
  }

  /** A tile's scores, in lines. */
  about(tile) {
    const { layer } = this;
    const lines = [`tile ${tile}   x ${layer.coords[2 * tile]}  y ${layer.coords[2 * tile + 1]}`];
    if (layer.scored) {
      const { member } = this.drawn;
      const sd = layer.sd(member, tile);
      lines.push(`${layer.name.split(" (")[0]}  ${short(layer.values(member, "raw")[tile])}${sd === null ? "" : ` ± ${short(sd)} (SD)`}`);
      lines.push(`percentile  ${layer.values(member, "percentile")[tile].toFixed(1)}`);
    }
    return lines.join("\n");
  }
}
