"""Writes what a study or a comparison shows: metrics.json, slides.csv, patients.csv, subgroups.csv (where
there are sub-groups), figures/*.png, report.html, model-card.md, checklists.md.

Numbers reach the page only out of the dictionary that `metrics.json` holds.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from extract.pages.page import as_data, finished, head, script
from extract.tables import write_csv
from extract.whole import write_whole
from extract.wording import p_value
from mil.report.checklists import Checklist, Part, card_markdown, checklists_markdown, filled_in, model_card
from mil.report.commands import draw_slide
from mil.report.curves import KINDS, box_in_svg, told_curves
from mil.report.facts import read_facts
from mil.report.figures import CAPTIONS, CAPTIONS_MANY, FIGURES, comparison_figure, make_sets, shortened, to_svg
from mil.report.sections import SECTIONS
from mil.report.wording import (
    about_settings,
    about_training,
    auc_name,
    comparison_table,
    difference_rows,
    main_metric,
    overview_markdown,
    overview_text,
    shown,
)
from mil.results.published import published
from mil.results.subgroups import subgroups_table
from mil.results.summary import summarise
from mil.results.tables import member_thresholds, patients_table, slides_table
from mil.study.units import by_slide
from mil.tasks.metrics import METRICS
from mil.training.hashes import without_times

TEMPLATES = Path(__file__).with_name("templates")
MODEL_CARD, CHECKLISTS = "model-card.md", "checklists.md"
MOST_WRONG = 20
P_VALUES = {"p_value", "p_holm", "log_rank_p"}
"""Keys in metrics.json under which numbers are worded as p values."""


def write_report(
    folder: Path,
    *,
    title: str,
    predictions: pd.DataFrame,
    plan: pd.DataFrame,
    history: pd.DataFrame,
    classes: Sequence[str],
    config_yaml: str,
    environment: dict[str, Any],
    notes: Sequence[str] = (),
    heatmaps: Sequence[Mapping[str, Any]] = (),
    bootstrap: int = 1000,
    seed: int = 0,
    choices: pd.DataFrame | None = None,
    also: Mapping[str, Any] | None = None,
    thresholds: pd.DataFrame | None = None,
    members_file: str = "predictions.csv",
    never_trained_on: bool = True,
    paths: bool = False,
    drawn_by: Sequence[str] = ("run=.",),
    slide_columns: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Write all files of a report (see above) into `folder`; give the metrics.

    Args:
        title: heading of the page.
        predictions, plan, classes, bootstrap, seed, choices, thresholds: as for `summarise`.
        history: one row a member and epoch (from 1): member, epoch, train_loss, train_auc, val_loss, val_auc.
        config_yaml: the resolved config, shown as it is.
        environment: versions, hardware and the like, shown as a table without dates and durations, by which one page
            of the same study would differ from the next.
        notes: what the reader must know, for instance slides that were dropped.
        also: further numbers for metrics.json, such as `learning_curve`.
        members_file: the file beside the page that holds `predictions`.
        heatmaps: single slides with their tile scores, as `mil.look.scenes.for_report` gives them.
        never_trained_on: False where the test slides may be of patients that members trained on.
        paths: whether the page shows paths in full; else as seen from `folder`.
        drawn_by: what `python -m mil.heatmap` needs, beside the slide, to draw one of these.
        slide_columns: further columns of slides.csv; index: slide.
    """
    shown_text: Callable[[str], str] = str if paths else partial(published, folder=folder)
    thresholds = member_thresholds(predictions, classes) if thresholds is None else thresholds
    metrics = summarise(
        predictions, plan, classes, bootstrap=bootstrap, seed=seed, choices=choices, thresholds=thresholds
    ) | dict(also or {})
    slides = slides_table(predictions, classes, thresholds)
    sets = make_sets(predictions, plan, history, classes, metrics, thresholds)
    captions = CAPTIONS | CAPTIONS_MANY if len(classes) > 2 else CAPTIONS
    drawn = {name: (heading, captions[name], draw(sets)) for name, (heading, draw) in FIGURES.items()}
    curves = told_curves(sets)
    shown_notes = [shown_text(note) for note in notes]
    documents = Documents.of(title, metrics, config_yaml, environment, shown_notes, shown_text)
    page = render(
        "study",
        metrics,
        title=title,
        figures=shown_figures(folder, drawn, told=bool(curves)),
        curves=curves,
        drawn_by=[shown_text(part) for part in drawn_by],
        model_card=documents.card,
        checklists=documents.lists,
        sections=shown_sections(folder, metrics),
        slides=slides[slides["error"].notna()].head(MOST_WRONG).to_dict("records"),
        notes=shown_notes,
        heatmaps=list(heatmaps),
        config_yaml=shown_text(config_yaml),
        environment=environment_rows(environment, shown_text),
        members_file=members_file,
        never_trained_on=never_trained_on,
    )
    all_columns = slides if slide_columns is None else slides.join(slide_columns, on="slide")
    all_columns = by_slide(all_columns, predictions.drop_duplicates("slide"))
    for file, table in (("slides.csv", all_columns), ("patients.csv", patients_table(slides, classes))):
        write_csv(table, folder / file)
    if "subgroups" in metrics:
        write_csv(subgroups_table(metrics["subgroups"]), folder / "subgroups.csv")
    write_whole(folder / "report.html", page)
    documents.write(folder)
    # last: without it a run is not finished
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    return metrics


@dataclass(frozen=True)
class Documents:
    """The model card and the checklists of a report, for its page and as Markdown beside it."""

    title: str
    card: list[Part]
    lists: list[Checklist]

    @classmethod
    def of(
        cls,
        title: str,
        metrics: Mapping[str, Any],
        config_yaml: str,
        environment: Mapping[str, Any],
        shown_notes: Sequence[str],
        shown_text: Callable[[str], str],
    ) -> Documents:
        """What the run knows, with paths as the page has them."""
        known = published_tree(without_times(dict(environment)), shown_text)
        facts = read_facts(metrics, shown_text(config_yaml), known, shown_notes)
        return cls(title, model_card(facts), filled_in(facts))

    def write(self, folder: Path) -> None:
        """model-card.md and checklists.md."""
        write_whole(folder / MODEL_CARD, card_markdown(self.title, self.card))
        write_whole(folder / CHECKLISTS, checklists_markdown(self.title, self.lists))


def shown_figures(
    folder: Path, drawn: Mapping[str, tuple[str, str, Figure | None]], told: bool = False
) -> list[dict[str, Any]]:
    """Figures as the page shows them, each saved as a PNG too.

    Args:
        drawn: name -> heading, caption, figure or None.
        told: whether the page has the points of the curves (`mil.report.curves`).
    """
    shown_ones = []
    for name, (heading, caption, figure) in drawn.items():
        if figure is not None:
            save_png(folder / "figures" / f"{name}.png", figure)
            svg = to_svg(figure, name, heading)
            points = {"curves": KINDS[name], "box": box_in_svg(figure)} if told and name in KINDS else {}
            shown_ones.append({"name": name, "title": heading, "svg": svg, "caption": caption, **points})
    return shown_ones


def shown_sections(folder: Path, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections of `SECTIONS` whose block is in the metrics, with their figures."""
    found = []
    for name, section in SECTIONS.items():
        if metrics.get(name):
            drawn = {f.name: (f.heading, f.caption, f.draw(metrics)) for f in section.figures}
            found.append({"name": name, "heading": section.heading, "figures": shown_figures(folder, drawn)})
    return found


def write_overview(
    folder: Path,
    studies: Mapping[str, dict[str, Any]],
    *,
    differences: pd.DataFrame | None = None,
    links: Mapping[str, str] | None = None,
    title: str = "Comparison of aggregators",
) -> str:
    """Compare studies on one plan: report.html, comparison.csv, comparison.md, differences.csv, figures/comparison.png.

    Args:
        folder: where they are written.
        studies: name -> what `write_report` gave.
        differences: as `mil.report.comparison.differences` gives it; None = left out.
        links: name -> the study's own page as seen from `folder`; default NAME/report.html.

    Returns:
        The table for the terminal.
    """
    if not studies:
        raise ValueError("expected at least one study to compare, got none")
    figure = comparison_figure(studies)
    save_png(folder / "figures" / "comparison.png", figure)
    first = next(iter(studies.values()))
    of_task = "metric_titles" in first
    page = render(
        "task_comparison" if of_task else "comparison",
        dict(studies),
        title=title,
        svg=to_svg(figure, "comparison", f"{auc_name(first) if of_task else 'AUC'} of every aggregator"),
        rows=[
            {"name": name, "href": quote((links or {}).get(name, f"{name}/report.html")), "metrics": m}
            for name, m in studies.items()
        ],
        differences=difference_rows(differences),
        about_training=" ".join(about_training(differences)),
        about_settings=" ".join(about_settings(studies)),
        first=first,
        ladders=ladders_of(studies),
        **({"titles": first["metric_titles"], "main": main_metric(first)} if of_task else {}),
    )
    write_csv(comparison_table(studies), folder / "comparison.csv")
    if differences is not None:
        write_csv(differences, folder / "differences.csv")
    write_whole(folder / "comparison.md", overview_markdown(studies, differences))
    write_whole(folder / "report.html", page)
    return overview_text(studies, differences)


def ladders_of(studies: Mapping[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Ladders of baselines that differ: the first study that has it, and all that have the same (one, on one plan)."""
    found: dict[str, list[str]] = {}
    for name, metrics in studies.items():
        if metrics.get("baselines"):
            scores = [{k: v for k, v in own.items() if k != "difference"} for own in sets_of(metrics["baselines"])]
            found.setdefault(json.dumps(scores), []).append(name)
    return [(names[0], names) for names in found.values()]


def sets_of(baselines: dict[str, Any]) -> list[dict[str, Any]]:
    return [own for rung in baselines["rungs"] for own in rung.values() if isinstance(own, dict)]


def render(kind: str, metrics: dict[str, Any], **values: Any) -> str:
    """The page from its template. `num(*keys)` writes the number at that place in `metrics` and its JSON pointer."""

    def num(*keys: Any) -> Markup:
        keys = tuple(k for key in keys for k in (key if isinstance(key, list) else [key]))
        value: Any = metrics
        for key in keys:
            value = value[key]
        pointer = "/" + "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        text = shown(value) if isinstance(value, float) or value is None else str(value)
        text = p_value(value) if isinstance(value, float) and keys[-1] in P_VALUES else text
        css = "undefined" if value is None else "n"
        return Markup('<span class="{}" data-key="{}">{}</span>').format(css, pointer, text)

    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    of_page = {"head": head(values["title"], style), "script": script()}
    titles = {k: v.title for k, v in METRICS.items()}
    template = templates().get_template("page.html")
    values = {"titles": titles} | values
    return finished(template.render(kind=kind, m=metrics, num=num, **of_page, **values))


@cache
def templates() -> jinja2.Environment:
    """The reader of templates: compiling them all took a fifth of a small study, so each is compiled once a process."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "shown": shown,
        "as_data": as_data,
        "draw_slide": draw_slide,
        "short": partial(shortened, length=40),
    }
    return environment


def save_png(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    write_whole(path, buffer.getvalue())
    figure.set_layout_engine("none")  # laid out once; the SVG takes it as it is


def environment_rows(environment: Mapping[str, Any], shown_text: Callable[[str], str]) -> dict[str, str]:
    """The environment as the page's table has it: without dates and durations, which differ from run to run."""
    return {str(key): shown_text(plain_text(value)) for key, value in without_times(dict(environment)).items()}


def published_tree(value: Any, shown_text: Callable[[str], str]) -> Any:
    """The value with all texts in it as they are shown."""
    if isinstance(value, Mapping):
        return {str(key): published_tree(inner, shown_text) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [published_tree(inner, shown_text) for inner in value]
    return shown_text(value) if isinstance(value, str) else value


def plain_text(value: Any) -> str:
    """A value of environment.json in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain_text(inner) for inner in value)
    return str(value)
