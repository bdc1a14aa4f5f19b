// "Wrong label", "bad quality", "look again", with a note: sent as it is chosen.

import { el } from "./el.js";
import { post } from "./net.js";

export class Reviews {
  constructor(catalogue, marks, changed, say) {
    Object.assign(this, { catalogue, marks, changed, say });
  }

  async put(slide, mark, note) {
    try {
      const { reviews } = await post("reviews", { slide: slide.number, mark, note });
      this.catalogue.setReviews(reviews);
      this.say(mark ? `${slide.name}: marked “${mark}”.` : `${slide.name}: no mark any more.`);
      this.changed();
    } catch (error) {
      this.say(`Not written: ${error.message}`);
    }
  }

  /** The form for one slide. */
  form(slide) {
    if (!this.catalogue.reviews) return [];
    const review = this.catalogue.marks.get(slide.name);
    const note = el("textarea", { "aria-label": "Note on this slide", placeholder: "Note", maxLength: 2000, value: review?.note ?? "" });
    note.addEventListener("change", () => this.catalogue.marks.get(slide.name) && this.put(slide, this.catalogue.marks.get(slide.name).mark, note.value));
    const buttons = this.marks.map((mark, i) => {
      const chosen = review?.mark === mark;
      return el("button", { type: "button", textContent: mark, title: `Key ${i + 1}`, "aria-pressed": String(chosen), "data-mark": mark, onclick: () => this.put(slide, chosen ? "" : mark, note.value) });
    });
    return [el("h3", { textContent: "Review" }), el("div", { className: "review" }, ...buttons, note)];
  }

  /** By key: the mark, or without it where it is there already. */
  toggle(slide, place) {
    const review = this.catalogue.marks.get(slide.name);
    const mark = this.marks[place];
    if (this.catalogue.reviews && mark) this.put(slide, review?.mark === mark ? "" : mark, review?.note ?? "");
  }
}
