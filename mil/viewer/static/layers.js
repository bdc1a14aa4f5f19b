// Which layer a pane shows: study, score, member; fetched once each and kept while the slide is shown.

import { el, options } from "./el.js";
import { getBytes } from "./net.js";
import { Layer } from "./scores.js";
import { on, set, state } from "./state.js";

const cache = new Map();
const KEPT = 8;

/** The layer of a slide, from the server or from those kept. */
export async function layerOf(path) {
  if (!cache.has(path)) {
    const made = getBytes(path).then((bytes) => new Layer(bytes));
    cache.set(path, made);
    made.catch(() => cache.delete(path));
    if (cache.size > KEPT) cache.delete(cache.keys().next().value);
  }
  return cache.get(path);
}

/** Ask again next time. */
export const forget = (path) => cache.delete(path);

/** quick: only those members' scores that held the slide out; the layer says whether there are more. */
export function pathOfScores(number, study, kind, target, quick = false) {
  const query = new URLSearchParams({ kind });
  if (quick) query.set("only", "honest");
  if (kind === "evidence" && target !== "") query.set("target", target);
  return `study/${study}/slide/${number}/scores.bin?${query}`;
}

/** Selects for one pane. which: "" for the first, "2" for the second. */
export class LayerControls {
  constructor(root, catalogue, which) {
    this.catalogue = catalogue;
    this.which = which;
    this.study = this.#select("study", "Run or aggregator", catalogue.studies.map((study, i) => [i, study.name]));
    this.kind = this.#select("kind", "Score", [["attention", "attention"], ["evidence", "evidence"]]);
    this.target = this.#select("target", "Class that evidence speaks for", []);
    this.member = this.#select("member", "Members", [["all", "ensemble"]]);
    root.append(...[this.study, this.kind, this.target, this.member].map(([label]) => label));
    on(["study", "kind", "target", "member"].map((key) => key + which), () => this.show());
    this.show();
  }

  #select(key, name, pairs) {
    const select = el("select", { name: key + this.which, "aria-label": name });
    options(select, pairs, state[key + this.which]);
    select.addEventListener("change", () => set({ [key + this.which]: key === "study" ? Number(select.value) : select.value }));
    return [el("label", {}, select), select];
  }

  show() {
    const study = this.catalogue.studies[state[`study${this.which}`] || 0];
    if (!study) return;
    options(this.target[1], [["", study.classes.length ? "default class" : "any cut"], ...study.targets.map((name, i) => [i, `for ${study.classes.length ? "" : "at least "}${name}`])], state[`target${this.which}`]);
    this.target[0].hidden = state[`kind${this.which}`] !== "evidence" || study.targets.length < (study.classes.length ? 3 : 1);
    for (const [key, [, select]] of [["study", this.study], ["kind", this.kind], ["member", this.member]]) select.value = String(state[key + this.which]);
    this.study[0].hidden = this.catalogue.studies.length < 2;
  }

  /** Members of the slide's details, each with what the slide was to it. */
  members(details) {
    const said = { train: "trained on it", val: "selected with it", test: "held it out", unused: "never saw it" };
    const pairs = details.members.map(({ member, role }) => [member, `member ${member}: ${said[role] ?? role}`]);
    const n = details.honest.length;
    const chosen = state[`member${this.which}`];
    const known = chosen === "all" || details.members.some(({ member }) => String(member) === String(chosen));
    options(this.member[1], [["all", n > 1 ? `ensemble of ${n} that held it out` : "the member that held it out"], ...pairs], known ? chosen : "all");
    if (!known) set({ [`member${this.which}`]: "all" });
  }
}
