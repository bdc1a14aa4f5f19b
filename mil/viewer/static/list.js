// The list of slides: only the rows in sight exist, however many slides there are.

import { decimals, el, options } from "./el.js";
import { on, set, state } from "./state.js";

const ROW = 64;
const BEYOND = 4;

/** Quarters from the lowest to the highest, all else by the alphabet. */
const QUARTERS = ["lowest", "second", "third", "highest"];
const asQuarters = (a, b) => QUARTERS.findIndex((word) => a.includes(word)) - QUARTERS.findIndex((word) => b.includes(word)) || (a < b ? -1 : 1);

export class SlideList {
  constructor(root, catalogue) {
    this.catalogue = catalogue;
    this.order = [];
    this.rows = new Map();
    this.inner = el("div", { id: "rows" });
    this.box = el("div", { id: "list", role: "listbox", tabIndex: 0, "aria-label": "Slides, one a row" }, this.inner);
    this.count = el("div", { id: "count", className: "muted", role: "status" });
    root.append(this.#filters(), this.count, this.box);
    this.box.addEventListener("scroll", () => this.#draw(), { passive: true });
    this.box.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#draw()).observe(this.box);
    on(["sort", "text", "label", "group", "role", "site", "mark", "study"], () => this.refresh());
    on(["slide"], () => this.#reveal());
    this.refresh();
  }

  #filters() {
    const { slides, studies } = this.catalogue;
    const search = el("input", { type: "search", placeholder: "Search slide or patient", "aria-label": "Search slide or patient", value: state.text });
    search.addEventListener("input", () => set({ text: search.value }));
    const sorts = this.catalogue.sorts();
    const used = (column) => column.names.filter((name) => name).map((name) => [name, name]).sort();
    const marks = ["wrong label", "bad quality", "look again"].map((mark) => [mark, mark]);
    const roles = studies.length ? [...new Set(studies.flatMap((study) => study.role.names))].sort().map((name) => [name, name]) : [];
    const groups = [...new Set(studies.flatMap((study) => used(study.group ?? { names: [] }).map(([name]) => name)))].sort(asQuarters).map((name) => [name, name]);
    const parts = [
      this.#select("sort", "Sort by", sorts, null),
      this.#select("label", "Class", used(slides.label), "All classes"),
      this.#select("group", "Group", groups, "All groups"),
      this.#select("role", "Role", roles, "All roles"),
      this.#select("site", "Site", used(slides.site), "All sites"),
      this.catalogue.reviews ? this.#select("mark", "Review", [...marks, ["none", "not marked"]], "All reviews") : null,
    ];
    return el("form", { id: "filters", role: "search", onsubmit: (event) => event.preventDefault() }, search, ...parts.filter((part) => part));
  }

  #select(key, name, pairs, everything) {
    if (everything && pairs.length < 2) return null;
    const select = el("select", { "aria-label": name, name: key });
    options(select, everything ? [["", everything], ...pairs] : pairs, state[key]);
    if (select.selectedIndex < 0) select.selectedIndex = 0;
    select.addEventListener("change", () => set({ [key]: select.value }));
    on([key], () => (select.value = state[key]));
    return select;
  }

  refresh() {
    this.order = this.catalogue.ordered(state);
    this.place = new Map(this.order.map((number, place) => [number, place]));
    this.inner.style.height = `${this.order.length * ROW}px`;
    const all = this.catalogue.names.length;
    this.count.textContent = this.order.length === all ? `${all.toLocaleString("en")} slides` : `${this.order.length.toLocaleString("en")} of ${all.toLocaleString("en")} slides`;
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    this.#reveal();
  }

  #draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - BEYOND);
    const last = Math.min(this.order.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + BEYOND);
    for (const [place, row] of this.rows) {
      if (place >= first && place < last) continue;
      row.remove();
      this.rows.delete(place);
    }
    for (let place = first; place < last; place++) {
      if (this.rows.has(place)) continue;
      const row = this.#row(place);
      this.rows.set(place, row);
      this.inner.append(row);
    }
  }

  #row(place) {
    const slide = this.catalogue.of(this.order[place], state.study);
    const judged = slide.judged && slide.predicted && slide.label;
    const wrong = judged && slide.predicted !== slide.label;
    const second = [slide.truth || slide.label || "no label", slide.role || slide.split, slide.site].filter((part) => part).join(" · ");
    const picture = slide.tiled || this.catalogue.studies.length ? el("img", { className: "thumb", alt: "", loading: "lazy", decoding: "async", src: `slide/${slide.number}/thumb.jpg` }) : el("div", { className: "thumb" });
    const row = el(
      "div",
      { className: "row", role: "option", id: `slide-${slide.number}`, title: slide.name, onclick: () => set(fresh(slide.name)) },
      picture,
      el("div", {}, el("div", { className: "name", textContent: slide.name }), el("div", { className: "second muted", textContent: second }), slide.review ? el("span", { className: "mark warn", textContent: slide.review.mark }) : null),
      el("div", { className: "p" }, slide.p === null ? "" : decimals(slide.p), el("div", { className: `second ${wrong ? "wrong" : judged ? "right" : "muted"}`, textContent: slide.predicted ? `${wrong ? "✗" : judged ? "✓" : ""} ${slide.predicted}` : "" })),
    );
    row.style.top = `${place * ROW}px`;
    row.setAttribute("aria-setsize", this.order.length);
    row.setAttribute("aria-posinset", place + 1);
    row.setAttribute("aria-selected", slide.name === state.slide);
    picture.addEventListener?.("error", () => picture.replaceWith(el("div", { className: "thumb" })));
    return row;
  }

  #reveal() {
    const place = this.place.get(this.catalogue.numbers.get(state.slide));
    if (place !== undefined) {
      const top = place * ROW;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      if (top + ROW > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + ROW - this.box.clientHeight;
    }
    this.#draw();
    for (const [at, row] of this.rows) row.setAttribute("aria-selected", at === place);
    if (place === undefined) this.box.removeAttribute("aria-activedescendant");
    else this.box.setAttribute("aria-activedescendant", `slide-${this.order[place]}`);
  }

  /** The slide that is `by` places further down. */
  step(by) {
    const place = this.place.get(this.catalogue.numbers.get(state.slide)) ?? -1;
    const next = Math.min(this.order.length - 1, Math.max(0, place + by));
    if (this.order.length) set(fresh(this.catalogue.names[this.order[next]]));
  }

  /** The slide below the one that is shown; null for the last. */
  next() {
    const place = this.place.get(this.catalogue.numbers.get(state.slide));
    const number = place === undefined ? undefined : this.order[place + 1];
    return number === undefined ? null : this.catalogue.of(number, state.study);
  }

  #key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / ROW) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    this.step(by === Infinity ? this.order.length : by === -Infinity ? -this.order.length : by);
  }
}

export const fresh = (slide) => ({ slide, x: "", y: "", zoom: "" });
