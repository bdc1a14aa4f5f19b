"""The reporting checklists TRIPOD+AI and CLAIM, filled in as far as a run knows the answers, and a model card.

Item numbers are those of the statements, topics are in words of our own. To answer one more item, name a function of
`mil.report.facts` in its line.

Sources: Collins et al., TRIPOD+AI statement, BMJ 2024;385:e078378 (27 items, 52 with their parts). Tejani et al.,
CLAIM 2024 update, Radiology: Artificial Intelligence 2024;6(4):e240300 (44 items). Mitchell et al., Model cards for
model reporting, FAccT 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mil.report import facts as f
from mil.report.facts import Facts

OPEN = "To be filled in by the authors"


@dataclass(frozen=True)
class Item:
    """A line of a checklist: `answer` is what the run knows, `rest` what only the authors do, if they must add to it.

    Without an answer all of it is the authors'.
    """

    number: str
    topic: str
    answer: Callable[[Facts], str] | None = None
    rest: str = ""


@dataclass(frozen=True)
class Entry:
    """An item as it is shown: `said` by the run, `open` for the authors; one of them may be ""."""

    number: str
    topic: str
    said: str
    open: str


@dataclass(frozen=True)
class Checklist:
    """A checklist filled in."""

    name: str
    reference: str
    entries: list[Entry]

    @property
    def answered(self) -> int:
        """Items that need nothing more."""
        return sum(not entry.open for entry in self.entries)

    @property
    def partly(self) -> int:
        """Items to which the authors must add."""
        return sum(bool(entry.said and entry.open) for entry in self.entries)

    @property
    def left(self) -> int:
        """Items that the run knows nothing of."""
        return sum(not entry.said for entry in self.entries)


@dataclass(frozen=True)
class Part:
    """A part of the model card; its entries have no numbers."""

    heading: str
    entries: list[Entry]


def all_of(*answers: Callable[[Facts], str]) -> Callable[[Facts], str]:
    """Several answers, one after the other."""
    return lambda facts: _joined(*(answer(facts) for answer in answers))


def always(said: str) -> Callable[[Facts], str]:
    """An answer that is the same of every run."""
    return lambda _: said


def _joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


TRIPOD_AI = (
    Item("1", "Title: a prediction model is developed or evaluated, in whom, for what outcome"),
    Item("2", "Abstract (TRIPOD+AI for Abstracts)"),
    Item("3a", "Background: clinical context, rationale, earlier models"),
    Item("3b", "Background: target population, purpose and users of the model"),
    Item("3c", "Background: known inequalities between groups"),
    Item("4", "Objectives: development, evaluation, or both", f.split, "the aims"),
    Item("5a", "Data: sources, rationale, representativeness", f.cohort, "source, rationale, representativeness"),
    Item("5b", "Data: dates of accrual and follow-up"),
    Item("6a", "Participants: setting, number and place of centres", f.sites, "setting and centres"),
    Item("6b", "Participants: eligibility"),
    Item("6c", "Participants: treatments"),
    Item("7", "Data preparation and quality checks", f.tiles, "staining and scanning; whether alike between groups"),
    Item("8a", "Outcome: definition, when and how assessed", f.classes_of_slides, "definition and assessment"),
    Item("8b", "Outcome: who assessed it, where it takes judgement"),
    Item("8c", "Outcome: blinding of its assessment"),
    Item("9a", "Predictors: how they were chosen", f.predictors),
    Item("9b", "Predictors: definition and measurement", f.encoder, "scanner and staining"),
    Item("9c", "Predictors: who assessed them, where it takes judgement", always("None: all are computed.")),
    Item("10", "Sample size and its justification", f.cohort, "justification"),
    Item("11", "Missing data", f.dropped),
    Item("12a", "Analysis: how the data were used and divided", f.split),
    Item("12b", "Analysis: handling of predictors", f.tiles),
    Item(
        "12c",
        "Analysis: kind of model, building, tuning, internal validation",
        all_of(f.aggregator, f.recipe, f.split),
        "rationale",
    ),
    Item("12d", "Analysis: differences between clusters such as hospitals", f.sites),
    Item("12e", "Analysis: measures and plots of performance", all_of(f.measures, f.baselines), "rationale"),
    Item("12f", "Analysis: updating of the model", f.recalibration),
    Item("12g", "Analysis: how predictions are computed", f.how_to_predict),
    Item("13", "Class imbalance", f.imbalance),
    Item("14", "Fairness", f.subgroups),
    Item("15", "Model output, classes and thresholds", all_of(f.output, f.operating_points)),
    Item("16", "Development and evaluation data: differences", f.classes_of_slides, "setting, eligibility, outcome"),
    Item("17", "Ethical approval and consent"),
    Item("18a", "Open science: funding and the funders' role"),
    Item("18b", "Open science: conflicts of interest"),
    Item("18c", "Open science: protocol"),
    Item("18d", "Open science: registration"),
    Item("18e", "Open science: availability of data"),
    Item("18f", "Open science: availability of code", f.code, "where the study's own files can be had"),
    Item("19", "Involvement of patients and the public"),
    Item("20a", "Participants: flow", all_of(f.cohort, f.dropped), "who was left out earlier"),
    Item("20b", "Participants: characteristics", f.classes_of_slides, "demographic and clinical characteristics"),
    Item("20c", "Participants: evaluation compared with development data", f.classes_of_slides, "other predictors"),
    Item("21", "Model development: participants and events in each analysis", f.in_each_analysis),
    Item(
        "22",
        "Model specification: what it takes to predict, and restrictions",
        all_of(f.how_to_predict, f.licence),
        "where the model can be had",
    ),
    Item(
        "23a",
        "Performance with intervals, by key groups",
        all_of(f.results, f.accuracy, f.calibration, f.subgroups),
        "groups, where they are not compared above",
    ),
    Item("23b", "Performance between clusters", f.sites),
    Item("24", "Results of updating", f.recalibration),
    Item("25", "Interpretation"),
    Item("26", "Limitations", f.limits, "their effect"),
    Item("27a", "Use: input of poor quality or missing", f.how_to_predict, "what to do with poor slides in practice"),
    Item("27b", "Use: what users must do and know", always("No interaction with the model."), "the expertise needed"),
    Item("27c", "Use: next steps"),
)

CLAIM = (
    Item("1", "Title: AI and its kind", f.aggregator, "the title"),
    Item("2", "Abstract"),
    Item("3", "Background, intended use and clinical role"),
    Item("4", "Aims and hypotheses"),
    Item("5", "Prospective or retrospective"),
    Item("6", "Goal of the study"),
    Item("7", "Data: sources", f.cohort, "sources"),
    Item("8", "Data: inclusion and exclusion"),
    Item("9", "Data: preprocessing", f.tiles),
    Item("10", "Data: selection of subsets", f.predictors),
    Item("11", "Data: de-identification"),
    Item("12", "Data: missing", f.dropped),
    Item("13", "Data: image acquisition"),
    Item("14", "Reference standard: definition", f.classes_of_slides, "how labels were obtained"),
    Item("15", "Reference standard: rationale"),
    Item("16", "Reference standard: who annotated"),
    Item("17", "Reference standard: annotation of the test set"),
    Item("18", "Reference standard: variability between and within raters"),
    Item("19", "Partitions: how data were assigned", f.split),
    Item("20", "Partitions: disjoint at what level", always("Patients: all slides of one are on one side of a fold.")),
    Item("21", "Testing data: intended sample size", f.cohort, "the size that was intended"),
    Item("22", "Model: description", all_of(f.encoder, f.aggregator, f.output)),
    Item("23", "Model: software", f.software),
    Item("24", "Model: initial parameters", f.start),
    Item("25", "Training: details", all_of(f.recipe, f.imbalance)),
    Item("26", "Training: selection of the final model", f.selection),
    Item("27", "Training: ensembles", f.ensemble),
    Item("28", "Evaluation: metrics", all_of(f.measures, f.baselines), "comparison with published models"),
    Item("29", "Evaluation: uncertainty and significance", all_of(f.intervals, f.permutations, f.conformal)),
    Item("30", "Evaluation: robustness and sensitivity", all_of(f.robustness, f.sites)),
    Item("31", "Evaluation: explanation of predictions", f.explanation),
    Item("32", "Evaluation: internal data", f.internal),
    Item("33", "Evaluation: external data", f.external),
    Item("34", "Registration of a clinical trial"),
    Item("35", "Included and excluded", all_of(f.cohort, f.dropped), "who was left out earlier"),
    Item("36", "Characteristics in each partition", f.classes_of_slides, "demographic and clinical characteristics"),
    Item("37", "Performance in each partition", f.results),
    Item("38", "Diagnostic performance and its precision", all_of(f.accuracy, f.intervals)),
    Item("39", "Failures", f.mistakes, "their clinical reading"),
    Item("40", "Limitations", f.limits, "their discussion"),
    Item("41", "Implications for practice"),
    Item("42", "Protocol or further details", f.code, "the protocol"),
    Item(
        "43",
        "Availability of software, model and data",
        all_of(f.how_to_predict, f.licence),
        "where model and data can be had",
    ),
    Item("44", "Funding and the funders' role"),
)

LISTS: dict[str, tuple[str, tuple[Item, ...]]] = {
    "TRIPOD+AI": (
        "Collins GS, Moons KGM, Dhiman P, et al. TRIPOD+AI statement: updated guidance for reporting clinical "
        "prediction models that use regression or machine learning methods. BMJ 2024;385:e078378.",
        TRIPOD_AI,
    ),
    "CLAIM, 2024 update": (
        "Tejani AS, Klontzas ME, Gatti AA, et al. Checklist for Artificial Intelligence in Medical Imaging (CLAIM): "
        "2024 update. Radiology: Artificial Intelligence 2024;6(4):e240300.",
        CLAIM,
    ),
}

CARD: dict[str, tuple[Item, ...]] = {
    "Model": (
        Item("", "aggregator", f.aggregator),
        Item("", "encoder", f.encoder),
        Item("", "licences", f.licence),
        Item("", "training", f.recipe),
        Item("", "output", f.output),
        Item("", "to predict", f.how_to_predict),
    ),
    "Intended use": (
        Item("", "use and users", always("Research on slides like those below; not a diagnosis."), "intended use"),
        Item("", "not for", always("Decisions on patients; slides of another stain, tissue or preparation.")),
    ),
    "Data": (
        Item("", "slides", f.cohort, "source and dates"),
        Item("", "classes", f.classes_of_slides, "reference standard"),
        Item("", "left out", f.dropped),
        Item("", "preparation", f.tiles),
        Item("", "division", f.split),
    ),
    "Results": (
        Item("", "discrimination", f.results),
        Item("", "classification", f.accuracy),
        Item("", "calibration", f.calibration),
        Item("", "groups", f.subgroups),
        Item("", "uncertainty", f.intervals),
    ),
    "Limits": (
        Item("", "known to the run", f.limits),
        Item("", "explanations", f.explanation),
        Item("", "ethics and risks"),
    ),
}


def filled_in(facts: Facts) -> list[Checklist]:
    """The checklists with what the run knows."""
    return [
        Checklist(name, reference, [_entry(item, facts) for item in items])
        for name, (reference, items) in LISTS.items()
    ]


OF_TASKS = {"classes": "target", "discrimination": "main metric", "classification": "other metrics"}
"""Topics of the card in the words of a task other than classification."""


def model_card(facts: Facts) -> list[Part]:
    """The model card with what the run knows."""
    words = OF_TASKS if facts.of_task else {}
    return [
        Part(heading, [_entry(replace(item, topic=words.get(item.topic, item.topic)), facts) for item in items])
        for heading, items in CARD.items()
    ]


def _entry(item: Item, facts: Facts) -> Entry:
    said = item.answer(facts) if item.answer else ""
    left = "" if said and not item.rest else f"{OPEN}: {item.rest}." if said else f"{OPEN}."
    return Entry(item.number, item.topic, said, left)


def checklists_markdown(title: str, lists: Sequence[Checklist]) -> str:
    """checklists.md: a table each."""
    lines = [f"# Reporting checklists: {_cell(title)}", ""]
    lines += ["Topics are in words of our own: the statements say in full what each item asks for.", ""]
    for one in lists:
        lines += [f"## {one.name}", "", one.reference, "", "| item | topic | answer |", "| --- | --- | --- |"]
        lines += [f"| {e.number} | {e.topic} | {_cell(_joined(e.said, _marked(e.open)))} |" for e in one.entries]
        lines.append("")
    return "\n".join(lines)


def card_markdown(title: str, parts: Sequence[Part]) -> str:
    """model-card.md: a heading a part, a line an entry."""
    lines = [f"# Model card: {_cell(title)}", ""]
    for part in parts:
        lines += [f"## {part.heading}", ""]
        lines += [f"- {e.topic}: {_cell(_joined(e.said, _marked(e.open)))}" for e in part.entries]
        lines.append("")
    return "\n".join(lines)


def _marked(text: str) -> str:
    return f"**{text}**" if text else ""


def _cell(text: str) -> str:
    """Text as it is, in one line of Markdown: names of the user make neither columns nor elements."""
    escaped = text.replace("\\", "\\\\").replace("|", r"\|").replace("<", "&lt;").replace("`", r"\`")
    return _line(escaped)


def _line(text: str) -> str:
    return " ".join(text.split())
