// The slides as columns, and their order: sorting and filtering 20,000 rows takes a few milliseconds and asks nobody.

export class Catalogue {
  constructor(content) {
    Object.assign(this, content);
    this.names = content.slides.name;
    this.numbers = new Map(this.names.map((name, number) => [name, number]));
    this.marks = new Map();
  }

  text(column, number) {
    return column.names[column.codes[number]] ?? "";
  }

  of(number, study) {
    const s = this.studies[study];
    const { patient, label, split, site } = this.slides;
    return {
      number,
      name: this.names[number],
      patient: this.text(patient, number),
      label: this.text(label, number),
      split: this.text(split, number),
      site: this.text(site, number),
      file: this.slides.file[number] === 1,
      tiled: this.slides.tiled[number] === 1,
      outlines: this.slides.outlines[number] === 1,
      p: s ? s.p[number] : null,
      threshold: s ? s.threshold[number] : null,
      predicted: s ? this.text(s.predicted, number) : "",
      truth: s?.truth && !s.judged ? this.text(s.truth, number) : "",
      judged: !!s?.judged,
      role: s ? this.text(s.role, number) : "",
      review: this.marks.get(this.names[number]),
    };
  }

  /** Numbers of the slides that a state asks for, in its order. */
  ordered(state) {
    const s = this.studies[state.study];
    const kept = this.names.map((_, number) => number).filter((number) => this.#passes(number, state, s));
    const by = { error: s && [s.error, -1], doubt: s && [s.doubt, 1], p: s && [s.p, -1] }[state.sort];
    if (!by) return kept.sort((a, b) => (this.names[a] < this.names[b] ? -1 : this.names[a] > this.names[b] ? 1 : 0));
    const [values, sign] = by;
    const last = Number.POSITIVE_INFINITY;
    return kept.sort((a, b) => (values[a] === null ? last : sign * values[a]) - (values[b] === null ? last : sign * values[b]) || a - b);
  }

  /** What the list can be sorted by: what some slide has a number for. */
  sorts() {
    const has = (key) => this.studies.some((study) => study[key].some((value) => value !== null));
    const noun = [...new Set(this.studies.map((study) => study.noun))].join(" or ");
    const all = [["error", "Most wrong"], ["doubt", "Least sure"], ["p", `Highest ${noun}`]].filter(([key]) => has(key));
    return [...all, ["name", "Name"]];
  }

  #passes(number, state, study) {
    const { patient, label, site } = this.slides;
    if (state.label && this.text(label, number) !== state.label) return false;
    if (state.group && study?.group && this.text(study.group, number) !== state.group) return false;
    if (state.site && this.text(site, number) !== state.site) return false;
    if (state.role && study && this.text(study.role, number) !== state.role) return false;
    const mark = this.marks.get(this.names[number])?.mark;
    if (state.mark && (state.mark === "none" ? mark : mark !== state.mark)) return false;
    if (!state.text) return true;
    const wanted = state.text.toLowerCase();
    return [this.names[number], this.text(patient, number)].some((text) => text.toLowerCase().includes(wanted));
  }

  setReviews(rows) {
    this.marks = new Map(rows.map((row) => [row.slide, row]));
  }
}
