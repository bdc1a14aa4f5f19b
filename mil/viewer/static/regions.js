// Regions to leave out: drawn with Annotorious over a view that stands still, or all that is in view, or the whole slide.

/* global Annotorious */

import { el } from "./el.js";
import { post } from "./net.js";

let loading = null;

/** Annotorious, when somebody draws for the first time: most never do. */
function annotorious() {
  loading ??= new Promise((resolve, reject) => {
    const failed = () => reject(new Error("the files for drawing are not answered; was the viewer stopped?"));
    const script = el("script", { src: "static/vendor/annotorious.js", onload: resolve, onerror: failed });
    document.head.append(el("link", { rel: "stylesheet", href: "static/vendor/annotorious.css" }), script);
  }).catch((error) => {
    loading = null;
    throw error;
  });
  return loading;
}

export class Regions {
  /** pane: where it is drawn. written(): what to do when the file has changed, a promise. */
  constructor(pane, written, say) {
    Object.assign(this, { pane, written, say, turn: 0 });
  }

  async #send(slide, wish) {
    try {
      const { file, regions } = await post("exclude", { slide: slide.number, ...wish });
      await this.written();
      this.say(`${file}: ${regions} region${regions === 1 ? "" : "s"}. Extraction leaves it out with tissue.regions=FOLDER tissue.without_regions=whole.`);
    } catch (error) {
      this.say(`Not written: ${error.message}`);
    }
  }

  whole = (slide) => this.#send(slide, { whole: true });
  undo = (slide) => this.#send(slide, { undo: true });

  inView(slide) {
    const { clientWidth: width, clientHeight: height } = this.pane.stage;
    this.#corners(slide, [[0, 0], [width, 0], [width, height], [0, height]]);
  }

  #corners(slide, points) {
    const corners = points.map(([x, y]) => this.pane.point(x, y)).map(({ x, y }) => [Math.round(x), Math.round(y)]);
    this.#send(slide, { corners });
  }

  /** Draw one region; Escape stops. */
  async draw(slide, tool) {
    this.stop();
    const turn = ++this.turn;
    try {
      await annotorious();
    } catch (error) {
      this.say(`Not drawn: ${error.message}`);
      return;
    }
    if (turn !== this.turn) return;
    const { stage } = this.pane;
    const sheet = el("canvas", { width: stage.clientWidth, height: stage.clientHeight });
    this.sheet = el("div", { className: "drawing" }, sheet);
    stage.append(this.sheet);
    this.annotator = Annotorious.createImageAnnotator(sheet, { drawingEnabled: true, autoSave: true, drawingMode: tool === "polygon" ? "click" : "drag" });
    this.annotator.setDrawingTool(tool);
    this.annotator.on("createAnnotation", (annotation) => {
      const { geometry, type } = annotation.target.selector;
      const { x, y, w, h, points } = geometry;
      const drawn = type === "RECTANGLE" ? [[x, y], [x + w, y], [x + w, y + h], [x, y + h]] : points;
      this.stop();
      if (drawn) this.#corners(slide, drawn);
    });
    this.say(tool === "rectangle" ? "Drag a rectangle over what is to be left out; Escape stops." : "Click the corners, then the first again; Escape stops.");
  }

  stop() {
    this.turn++;
    this.annotator?.destroy();
    this.sheet?.remove();
    this.annotator = this.sheet = null;
  }
}
