// The right side: what is said of the slide, its most and least important tiles, the patient's other slides.

import { decimals, el, short } from "./el.js";
import { fresh } from "./list.js";
import { set } from "./state.js";

const TILES = 6;

function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return el("dl", { className: "facts" }, ...shown.flatMap(([name, value]) => [el("dt", { textContent: name }), el("dd", { textContent: value })]));
}

/** Where the line begins and ends: 0 and 1 for probabilities, else what the study and its members say at most. */
function endsOf(study, own) {
  if (study.classes.length) return [0, 1];
  const all = [...study.p, ...own].filter((value) => value !== null);
  const [low, high] = all.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  return high > low ? [low, high] : [low - 1, high + 1];
}

/** The study's number with the members around it and the threshold, on a line. */
function membersPicture(study, details, shown, mean) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const part = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    svg.append(made);
  };
  svg.setAttribute("viewBox", "0 0 290 74");
  svg.setAttribute("class", "members");
  svg.setAttribute("role", "img");
  const own = details.members.filter(({ member }) => details.honest.includes(member)).map(({ p }) => p[shown]).filter((p) => p !== null);
  const [low, high] = [Math.min(...own), Math.max(...own)];
  svg.setAttribute("aria-label", `${study.noun} ${decimals(mean)}; members ${decimals(low)} to ${decimals(high)}; threshold ${decimals(details.threshold)}`);
  const [first, last] = endsOf(study, own);
  const at = (value) => 12 + (266 * (value - first)) / (last - first);
  part("line", { x1: at(first), x2: at(last), y1: 34, y2: 34, stroke: "currentColor", "stroke-opacity": 0.35 });
  part("line", { x1: at(low), x2: at(high), y1: 34, y2: 34, stroke: "#0072b2", "stroke-width": 7, "stroke-opacity": 0.45, "stroke-linecap": "round" });
  for (const p of own) part("circle", { cx: at(p), cy: 34, r: 2.6, fill: "#0072b2" });
  part("path", { d: `M ${at(mean)} 26 l 5 -9 h -10 z`, fill: "#d55e00" });
  if (details.threshold !== null) {
    part("line", { x1: at(details.threshold), x2: at(details.threshold), y1: 22, y2: 46, stroke: "currentColor", "stroke-dasharray": "3 2" });
    part("text", { x: Math.min(215, Math.max(12, at(details.threshold) - 30)), y: 70, "font-size": 10, fill: "currentColor" }, `threshold ${decimals(details.threshold)}`);
  }
  [first, (first + last) / 2, last].forEach((value, i) => part("text", { x: at(value), y: 56, "font-size": 10, fill: "currentColor", "text-anchor": ["start", "middle", "end"][i] }, short(value)));
  return svg;
}

export class Details {
  constructor(root, catalogue, { fly, review }) {
    Object.assign(this, { root, catalogue, fly, review });
    this.head = el("div");
    this.tiles = el("div");
    this.more = el("div");
    this.work = el("div");
    root.append(this.head, this.work, this.tiles, this.more);
  }

  /** What is said of the slide; details null without a run. */
  show(slide, study, details, info) {
    const parts = [el("h2", { textContent: slide.name })];
    const size = info ? `${info.levels.length ? `${info.width.toLocaleString("en")} × ${info.height.toLocaleString("en")} px` : "no slide file: a map of its tiles"}${info.mpp ? `, ${short(info.mpp)} µm/px` : ""}` : "";
    if (details?.predicted || details?.said) parts.push(...this.#verdict(slide, study, details));
    else if (details) parts.push(el("p", { className: "muted", textContent: "No member held this slide out: there is no honest prediction." }));
    parts.push(facts([["Patient", slide.patient], ["Label", details ? slide.truth || slide.label || "none" : slide.label || (slide.split ? "none" : "")], ["Role", details?.kind ?? slide.split], ["Site", slide.site], ["Slide", size]]));
    this.head.replaceChildren(...parts);
    this.tiles.replaceChildren();
    this.work.replaceChildren(...this.review(slide));
    this.#others(slide);
  }

  #verdict(slide, study, details) {
    const two = study.classes.length === 2;
    const shown = two ? 1 : details.p.indexOf(Math.max(...details.p)); // of another task there is one
    const own = details.members.filter(({ member }) => details.honest.includes(member)).map(({ p }) => p[shown]);
    const n = own.length;
    const right = details.label === null ? null : details.label === details.predicted;
    const says = right === null ? "There is no label." : right ? `The label says so too.` : `The label says ${details.label}.`;
    const interval = n > 1 ? `${n} members: ${decimals(Math.min(...own))} to ${decimals(Math.max(...own))}` : "one member held it out";
    if (details.said) return [el("p", {}, el("strong", { textContent: details.said })), el("p", { className: "muted", textContent: details.label ?? "The target is not known." }), ...(details.p[0] === null ? [] : [membersPicture(study, details, 0, details.p[0])]), el("p", { className: "muted", textContent: `${study.noun}, ${interval}` })];
    return [
      el("p", {}, el("strong", { textContent: `P(${study.classes[shown]}) = ${decimals(details.p[shown])}` }), ` · predicted ${details.predicted}`),
      el("p", { className: right === false ? "wrong" : right ? "right" : "muted", textContent: says }),
      membersPicture(study, details, shown, details.p[shown]),
      el("p", { className: "muted", textContent: interval }),
    ];
  }

  /** Tiles of the first pane, by its scores. */
  shelves(slide, study, pane) {
    const { layer, values } = pane;
    if (!layer?.scored || !values) {
      this.tiles.replaceChildren();
      return;
    }
    const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
    const shelf = (heading, tiles) => [el("h3", { textContent: heading }), el("div", { className: "shelf" }, ...tiles.map((tile, i) => this.#tile(slide, study, pane, tile, i)))];
    const n = Math.min(TILES, order.length);
    const parts = [...shelf("Highest tiles", order.slice(0, n)), ...shelf("Lowest tiles", order.slice(-n).reverse())];
    this.tiles.replaceChildren(...parts);
  }

  #tile(slide, study, pane, tile, place) {
    const value = short(pane.values[tile]);
    const picture = slide.file ? el("img", { alt: "", loading: "lazy", src: `study/${study}/slide/${slide.number}/tile/${tile}.jpg` }) : el("div", { className: "plain" });
    if (!slide.file) picture.style.background = pane.colour(tile);
    return el("button", { type: "button", title: pane.about(tile), "aria-label": `Tile ${tile}, score ${value}: go there`, onclick: () => this.fly(tile), "data-tile": tile, "data-rank": place }, picture, value);
  }

  #others(slide) {
    const { patient } = this.catalogue.slides;
    const code = patient.codes[slide.number];
    const others = slide.patient ? this.catalogue.names.map((_, number) => number).filter((number) => patient.codes[number] === code && number !== slide.number) : [];
    if (!others.length) {
      this.more.replaceChildren();
      return;
    }
    const rows = others.slice(0, 50).map((number) => {
      const other = this.catalogue.of(number, this.study ?? 0);
      const text = [other.name, other.label, other.p === null ? "" : decimals(other.p)].filter((part) => part).join(" · ");
      return el("li", {}, el("button", { type: "button", textContent: text, onclick: () => set(fresh(other.name)) }));
    });
    const more = others.length > 50 ? [el("p", { className: "muted", textContent: `and ${others.length - 50} more` })] : [];
    this.more.replaceChildren(el("h3", { textContent: "The patient's other slides" }), el("ul", { className: "others" }, ...rows), ...more);
  }
}
