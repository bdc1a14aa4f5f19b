// The page in the order in which things happen: the list, a slide, its layers, what is said of it, what can be done.

import { Catalogue } from "./catalogue.js";
import { Details } from "./details.js";
import { el } from "./el.js";
import { helpDialog, listen } from "./keys.js";
import { LayerControls, forget, layerOf, pathOfScores } from "./layers.js";
import { SlideList } from "./list.js";
import { getJson } from "./net.js";
import { Pane } from "./pane.js";
import { Regions } from "./regions.js";
import { Reviews } from "./review.js";
import { geojson, picture } from "./save.js";
import { here, on, set, start, state } from "./state.js";
import { makeTools } from "./tools.js";

const find = (id) => document.getElementById(id);
const say = (text) => (find("said").textContent = text);

/** Milliseconds that somebody looks at a slide before the next one's scores are computed. */
const LATER = 1500;
/** Before the scores of the other members are asked for, which may be chosen next. */
const SOON = 400;

class Page {
  constructor(catalogue, marks, list) {
    this.catalogue = catalogue;
    this.turn = 0;
    this.panes = [];
    this.controls = [];
    this.list = list;
    this.reviews = new Reviews(catalogue, marks, () => this.#reviewed(), say);
    this.details = new Details(find("right"), catalogue, { fly: (tile) => this.#fly(tile), review: (slide) => [...this.reviews.form(slide), ...this.#exclusions(slide)] });
    makeTools(find("tools"), { scored: catalogue.studies.length > 0, exclude: catalogue.exclude, buttons: this.#buttons(), ends: () => this.panes[0]?.ends });
    this.#addPane("");
    this.regions = new Regions(this.panes[0], () => this.#regionsChanged(), say);
    if (state.study2 !== "" && catalogue.studies.length) this.#addPane("2");
    this.#listen();
  }

  get slide() {
    const number = this.catalogue.numbers.get(state.slide);
    return number === undefined ? null : this.catalogue.of(number, state.study);
  }

  #listen() {
    on(["slide"], () => this.open());
    on(["study", "kind", "target"], () => this.#layer(0));
    on(["study2", "kind2", "target2"], () => this.#second());
    on(["member", "member2", "scale", "fixed", "low", "high", "threshold", "opacity", "heat", "grid"], (names) => this.#paint(names));
    on(["outlines", "tissue"], () => this.#areas());
    on(["grid"], () => this.catalogue.studies.length || this.#grid());
    on(["x", "y", "zoom"], () => here() && !this.moving && this.panes[0].look(here(), true));
    listen(this.#keys());
    for (const button of document.querySelectorAll("#tabs button")) {
      button.addEventListener("click", () => this.tab(button.dataset.tab));
    }
    this.tab("middle");
  }

  tab(name) {
    document.body.dataset.tab = name;
    for (const button of document.querySelectorAll("#tabs button")) button.setAttribute("aria-pressed", String(button.dataset.tab === name));
  }

  #keys() {
    const flip = (key) => () => set({ [key]: state[key] ? 0 : 1 });
    const mark = (place) => () => this.slide && this.reviews.toggle(this.slide, place);
    this.rank = -1;
    return {
      j: () => this.list.step(1), k: () => this.list.step(-1),
      h: flip("heat"), o: flip("outlines"), t: flip("tissue"), g: flip("grid"),
      1: mark(0), 2: mark(1), 3: mark(2),
      "]": () => this.#step(1), "[": () => this.#step(-1),
      s: () => this.#beside(), "?": () => this.help.showModal(), Escape: () => this.regions.stop(),
    };
  }

  #buttons() {
    this.help = helpDialog();
    document.body.append(this.help);
    const button = (text, title, action) => el("button", { type: "button", textContent: text, title, onclick: action });
    const scored = this.catalogue.studies.length > 0;
    return [
      ...(scored ? [button("Side by side", "Two layers in step (s)", () => this.#beside())] : []),
      button("Save PNG", "What is seen", () => this.slide && picture(this.panes, this.slide.name)),
      ...(scored ? [button("Save tiles", "All tiles as GeoJSON for QuPath", () => this.slide && geojson(this.slide, "tiles")), button("Save regions", "The regions above the threshold (default: percentile 90) as GeoJSON", () => this.slide && geojson(this.slide, "regions"))] : []),
      button("?", "Keys", () => this.help.showModal()),
    ];
  }

  #exclusions(slide) {
    if (!this.catalogue.exclude || !slide.file) return [];
    const button = (text, action) => el("button", { type: "button", textContent: text, onclick: action });
    return [
      el("h3", { textContent: "Leave out of extraction" }),
      el("div", { className: "review" },
        button("Exclude this slide", () => this.regions.whole(slide)),
        button("Draw a rectangle", () => this.regions.draw(slide, "rectangle")),
        button("Draw a polygon", () => this.regions.draw(slide, "polygon")),
        button("What is in view", () => this.regions.inView(slide)),
        button("Take back", () => this.regions.undo(slide))),
      el("p", { className: "muted", textContent: `Written into ${this.catalogue.regions}, which tissue.regions reads.` }),
    ];
  }

  // --- panes ---------------------------------------------------------------------------------------------------------

  #addPane(which) {
    const pane = new Pane({ moved: (moved) => this.#moved(moved), hovered: () => {} });
    this.panes.push(pane);
    if (this.catalogue.studies.length) this.controls.push(new LayerControls(pane.controls, this.catalogue, which));
    else pane.controls.hidden = true;
    find("panes").append(pane.root);
    pane.begin();
  }

  #moved(moved) {
    const view = moved.view();
    if (!view) return;
    for (const pane of this.panes) if (pane !== moved && pane.info) pane.follow(view);
    this.moving = true;
    set({ x: Math.round(view.x), y: Math.round(view.y), zoom: Number(view.zoom.toPrecision(4)) });
    this.moving = false;
  }

  #beside() {
    if (!this.catalogue.studies.length) return;
    if (this.panes.length > 1) {
      set({ study2: "" });
      return;
    }
    const other = this.catalogue.studies.length > 1 ? (state.study + 1) % this.catalogue.studies.length : state.study;
    set({ study2: other, kind2: other === state.study && state.kind === "attention" ? "evidence" : state.kind, member2: "all" });
  }

  async #second() {
    if (state.study2 === "" && this.panes.length > 1) {
      const gone = this.panes.pop();
      this.controls.pop();
      gone.viewer.destroy();
      gone.root.remove();
      return;
    }
    if (state.study2 === "") return;
    if (this.panes.length < 2) {
      this.#addPane("2");
      if (this.slide && this.info) await this.panes[1].open(this.slide, this.info, this.panes[0].view());
      this.#areas();
    }
    this.#layer(1);
  }

  // --- a slide -------------------------------------------------------------------------------------------------------

  async open() {
    const turn = ++this.turn;
    const { slide } = this;
    this.rank = -1;
    this.regions.stop();
    if (!slide) {
      this.info = null;
      for (const pane of this.panes) pane.close();
      say(state.slide ? `There is no slide ${state.slide} here.` : "Choose a slide.");
      return;
    }
    document.title = `${slide.name} · slide-mil`;
    say(`${slide.name} …`);
    this.#early(slide);
    let info = null;
    try {
      info = await getJson(`slide/${slide.number}.json`);
    } catch (error) {
      if (turn !== this.turn) return;
      for (const pane of this.panes) {
        pane.close();
        pane.say(`Not shown: ${error.message}`);
      }
    }
    if (turn !== this.turn) return;
    this.info = info;
    if (info) await Promise.all(this.panes.map((pane) => pane.open(slide, info, here())));
    if (turn !== this.turn) return;
    say(slide.name);
    await Promise.all([this.#told(slide, turn), this.#areas(), ...this.panes.map((_, place) => this.#layer(place))]);
    if (turn !== this.turn) return;
    document.body.dataset.slide = slide.name;
    setTimeout(() => turn === this.turn && this.#early(this.list.next()), LATER);
  }

  /** Ask for a slide's scores before they are needed: they are computed while its pictures come. */
  #early(slide) {
    if (!slide || !this.catalogue.studies.length) return;
    layerOf(pathOfScores(slide.number, state.study, state.kind, state.target, state.member === "all")).catch(() => {}); // said when it is shown
  }

  async #told(slide, turn) {
    const study = this.catalogue.studies[state.study];
    let details = null;
    if (study) {
      try {
        details = await getJson(`study/${state.study}/slide/${slide.number}.json`);
      } catch (error) {
        say(error.message);
      }
    }
    if (turn !== this.turn) return;
    this.details.study = state.study;
    this.details.show(slide, study, details, this.info);
    if (details) this.controls[0]?.members(details);
    this.#shelves();
  }

  async #layer(place) {
    const { slide, turn } = this;
    const pane = this.panes[place];
    if (!slide || !pane || !this.info) return;
    if (!this.catalogue.studies.length) {
      await this.#grid();
      return;
    }
    const which = place ? "2" : "";
    const [study, kind, target] = ["study", "kind", "target"].map((key) => state[key + which]);
    if (place === 0 && this.details.study !== undefined && this.details.study !== study) this.#told(slide, turn);
    const waiting = setTimeout(() => pane.say("Scores are computed …"), 300);
    try {
      const current = () => turn === this.turn && ["study", "kind", "target"].every((key, i) => state[key + which] === [study, kind, target][i]);
      const layer = await layerOf(pathOfScores(slide.number, study, kind, target, state[`member${which}`] === "all"));
      if (!current()) return;
      pane.set(layer);
      pane.say("");
      if (place) this.controls[1].members(await getJson(`study/${study}/slide/${slide.number}.json`));
      this.#paintPane(place);
      if (layer.more) setTimeout(() => current() && this.#complete(place, pathOfScores(slide.number, study, kind, target), current), SOON);
    } catch (error) {
      if (turn === this.turn) {
        pane.set(null);
        pane.draw();
        pane.say(`No scores: ${error.message}`);
      }
    } finally {
      clearTimeout(waiting);
      if (pane.said.textContent.startsWith("Scores are")) pane.say("");
    }
  }

  /** The other members' scores, so that choosing one asks nobody. */
  async #complete(place, path, current) {
    try {
      const layer = await layerOf(path);
      if (!current() || !this.panes[place]) return;
      this.panes[place].extend(layer);
      this.#paintPane(place);
    } catch (error) {
      if (current()) this.panes[place]?.say(`No scores of other members: ${error.message}`);
    }
  }

  async #grid() {
    const { slide, turn } = this;
    if (!slide || !state.grid) {
      this.#paint(new Set(["grid"]));
      return;
    }
    try {
      const layer = await layerOf(`slide/${slide.number}/grid.bin`);
      if (turn !== this.turn) return;
      this.panes[0].set(layer);
      say(`${slide.name}: ${layer.n.toLocaleString("en")} tiles ${layer.origin === "features" ? "of the features" : "would be laid"}.`);
      this.#paint(new Set(["grid"]));
    } catch (error) {
      say(`No grid: ${error.message}`);
    }
  }

  #paintPane(place) {
    const member = state[place ? "member2" : "member"];
    const { scale, fixed, low, high, threshold, opacity, heat, grid } = state;
    this.panes[place]?.paint({ member, scale, fixed, low, high, threshold, opacity, heat, grid }, this.catalogue.colours);
    if (!place) this.#shelves();
  }

  #paint(names) {
    const view = [...names].every((name) => ["opacity", "heat", "grid"].includes(name));
    this.panes.forEach((pane, place) => {
      if (!view) this.#paintPane(place);
      else {
        Object.assign(pane.drawn, { opacity: state.opacity, heat: state.heat, grid: state.grid });
        pane.colourbar.hidden = !state.heat || !pane.values;
        pane.draw();
      }
    });
  }

  #shelves() {
    const { slide } = this;
    if (slide) this.details.shelves(slide, state.study, this.panes[0]);
  }

  async #areas() {
    const { slide, turn } = this;
    if (!slide || !this.info) return;
    const areas = [];
    try {
      if (state.outlines && slide.outlines) areas.push(...(await getJson(`slide/${slide.number}/outlines.json`)));
      if (state.tissue && slide.file) {
        const tissue = await getJson(`slide/${slide.number}/tissue.json`);
        areas.push(...tissue.rings, ...tissue.regions);
        if (turn === this.turn) say(tissue.empty ? `${slide.name}: no tissue: ${tissue.empty}` : `${slide.name}: tissue ${(100 * tissue.fraction).toFixed(1)} %, ${tissue.area_mm2.toFixed(2)} mm²`);
      }
    } catch (error) {
      say(error.message);
    }
    if (turn === this.turn) for (const pane of this.panes) pane.areas(areas);
  }

  async #regionsChanged() {
    forget(`slide/${this.slide.number}/grid.bin`);
    await this.#areas();
    if (!this.catalogue.studies.length) await this.#grid();
  }

  // --- work ----------------------------------------------------------------------------------------------------------

  #fly(tile) {
    this.panes[0].fly(tile);
    if (document.body.dataset.tab === "right") this.tab("middle");
  }

  #step(by) {
    const tiles = [...document.querySelectorAll("#right [data-tile]")].map((button) => Number(button.dataset.tile));
    if (!tiles.length) return;
    this.rank = (this.rank + by + tiles.length) % tiles.length;
    this.#fly(tiles[this.rank]);
  }

  #reviewed() {
    this.list.refresh();
    if (this.slide) this.details.work.replaceChildren(...this.details.review(this.slide));
  }
}

/** OpenSeadragon's file is large, and is read while the list is drawn. */
const openSeadragon = new Promise((loaded, failed) => {
  const script = find("openseadragon");
  if (window.OpenSeadragon) loaded();
  script.addEventListener("load", loaded);
  script.addEventListener("error", () => failed(new Error("openseadragon.min.js was not sent")));
});
/** What was changed is on the screen; a tab that nobody looks at has no frames. */
const drawn = () =>
  new Promise((done) => {
    requestAnimationFrame(() => setTimeout(done));
    setTimeout(done, 100);
  });

async function begin() {
  start();
  try {
    const [content, { marks, reviews }] = await Promise.all([getJson("catalogue.json"), getJson("reviews.json")]);
    const catalogue = new Catalogue(content);
    catalogue.setReviews(reviews);
    if (!catalogue.studies[state.study]) state.study = 0;
    if (!catalogue.sorts().some(([key]) => key === state.sort)) state.sort = catalogue.sorts()[0][0];
    if (!content.studies.length && !location.hash.includes("tissue")) Object.assign(state, { tissue: 1, grid: 1 });
    const list = new SlideList(find("left"), catalogue);
    await Promise.all([openSeadragon, drawn()]);
    const page = new Page(catalogue, marks, list);
    if (!state.slide && page.list.order.length) set({ slide: catalogue.names[page.list.order[0]] });
    else await page.open();
    document.body.dataset.ready = "true";
  } catch (error) {
    say(`The viewer cannot start: ${error.message}`);
    throw error;
  }
}

begin();
