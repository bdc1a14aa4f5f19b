"""What a run knows of itself, in sentences: the answers of the model card and of the reporting checklists.

Each function takes `Facts` and gives a sentence or two, or "" where the run does not know. Numbers are those of
metrics.json, settings those of the config, versions and features those of environment.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from extract.encoders.table import ENCODERS, EncoderSpec
from extract.wording import count
from mil.report import task_facts
from mil.report.wording import auc_name, main_metric, mean_sd, shown, value_interval
from mil.tasks.metrics import METRICS


@dataclass(frozen=True)
class Facts:
    """metrics: as metrics.json. config: the resolved config. environment: as environment.json, as it is published."""

    metrics: Mapping[str, Any]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    notes: Sequence[str] = ()

    def setting(self, *keys: str) -> Any:
        """A value of the config, of this aggregator where it has its own; None where the config does not say it."""
        section = _at(self.config, keys[:-1]) or {}
        own = section.get(self.environment.get("aggregator"))
        return own[keys[-1]] if isinstance(own, Mapping) and keys[-1] in own else section.get(keys[-1])

    def known(self, *keys: str) -> Any:
        """A value of environment.json; None where it does not say it."""
        return _at(self.environment, keys)

    @property
    def of_another_study(self) -> bool:
        """Whether these are predictions of members that were trained earlier."""
        return "study" in self.environment

    @property
    def of_task(self) -> bool:
        """Whether the task is another than classification, whose answers are those of `mil.report.task_facts`."""
        return task_facts.of_task(self.metrics)

    @property
    def titles(self) -> Mapping[str, str]:
        """Of the metrics, the task's own."""
        own: Mapping[str, str] = self.metrics.get("metric_titles") or {k: one.title for k, one in METRICS.items()}
        return own

    @property
    def members(self) -> Sequence[Mapping[str, Any]]:
        """Of the plan, as far as they held something out."""
        found: Sequence[Mapping[str, Any]] = self.metrics["folds"] or (self.metrics["test"] or {}).get("members", ())
        return found


def read_facts(
    metrics: Mapping[str, Any], config_yaml: str, environment: Mapping[str, Any], notes: Sequence[str]
) -> Facts:
    """Facts of a run whose config is text; of a config that is no YAML mapping nothing is known."""
    try:
        config = yaml.safe_load(config_yaml)
    except yaml.YAMLError:
        config = None
    return Facts(metrics, config if isinstance(config, Mapping) else {}, environment, notes)


def _at(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


# --- slides and patients ---------------------------------------------------------------------------------------------


def cohort(facts: Facts) -> str:
    """How many slides and patients, cross-validated and held out."""
    counts = facts.metrics["counts"]
    parts = [(key, text) for key, text in PARTS if counts[key]["slides"]]
    return _sentence("; ".join(f"{text}: {_slides(counts[key])}" for key, text in parts))


PARTS = (("cross_validated", "cross-validated"), ("test", "held-out test"))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _slides(counts: Mapping[str, Any]) -> str:
    return f"{count(counts['slides'], 'slide')} of {count(counts['patients'], 'patient')}"


def classes_of_slides(facts: Facts) -> str:
    """Slides and patients of every class, cross-validated and held out; of other tasks what they hold of the target."""
    if facts.of_task:
        return task_facts.target(facts.metrics)
    found = []
    for key, text in PARTS:
        counts = facts.metrics["counts"][key]
        if counts["slides"]:
            each = zip(counts["slides_per_class"].items(), counts["patients_per_class"].values(), strict=True)
            found.append(f"{text}: " + ", ".join(f"{name} {slides} ({patients})" for (name, slides), patients in each))
    return "Slides (patients) of each class, " + "; ".join(found) + "." if found else ""


def is_of_dropped(note: str) -> bool:
    """Whether a note tells of slides that are not in the study; the others tell of what weakens it."""
    return re.search(r"\b(dropped|left out)\b", note) is not None


def dropped(facts: Facts) -> str:
    """Slides without features or label."""
    unlabelled = facts.metrics["counts"]["all"]["unlabelled"]
    said = f"{count(unlabelled, 'slide')} without a label: predicted, not scored. " if unlabelled else ""
    about = [text if text.endswith(".") else f"{text}." for text in facts.notes if is_of_dropped(text)]
    return said + (" ".join(about) if about else "No slide was left out.")


def split(facts: Facts) -> str:
    """Folds, repeats, seeds and val slides, and that patients are never divided."""
    if facts.of_another_study:
        return "Nothing here was trained on: the members were trained by the earlier study that is named below."
    folds, test = facts.metrics["folds"], facts.metrics["test"]
    n = len({(fold["repeat"], fold["fold"]) for fold in folds})
    repeats, seeds = (len({fold[key] for fold in folds}) for key in ("repeat", "seed"))
    said = f"{n}-fold cross-validation" if repeats < 2 else f"cross-validation, {n} folds in {repeats} repeats"
    said = said if n > 1 else "One held-out part" if n else "No cross-validation"
    said += f", {seeds} seeds a fold" if seeds > 1 else ""
    val = facts.setting("study", "val_fraction")
    said += f"; {val:.0%} of each training part held out to select the epoch" if val else ""
    said += f"; a test split of {_slides(facts.metrics['counts']['test'])} that no member saw" if test else ""
    own = facts.setting("study", "folds_csv")
    strata = task_facts.strata(facts.metrics) if facts.of_task else "folds are stratified by label"
    grouped = "the folds are the user's own (study.folds_csv)" if own else strata
    site = ", and so are sites" if facts.setting("study", "site_preserving") else ""
    return f"{_sentence(said)} Slides of a patient are kept together{site}; {grouped}."


def in_each_analysis(facts: Facts) -> str:
    """Slides that members trained on, selected with and held out."""
    members = facts.members
    if not members:
        return ""
    ends = {key: sorted({member[key] for member in members}) for key in ("n_train", "n_val")}
    held = sorted({member["counts"]["slides"] for member in members})
    said = f"Slides a member trained on: {_span(ends['n_train'])}; selected with: {_span(ends['n_val'])}"
    return f"{said}; held out: {_span(held)}. {classes_of_slides(facts)}"


def _span(values: Sequence[int]) -> str:
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


# --- what the model sees ---------------------------------------------------------------------------------------------


def spec_of(facts: Facts) -> EncoderSpec | None:
    """The encoder's line in the table of encoders, by its name there, also with an adapter, or by its hub name."""
    name = str(facts.known("features", "encoder")).partition("+")[0]
    by_hub = {spec.hub_repo.lower(): spec for spec in ENCODERS.values()}
    return ENCODERS.get(name.lower()) or by_hub.get(name.lower())


def encoder(facts: Facts) -> str:
    """The frozen network, its source, licence and weights."""
    name = facts.known("features", "encoder")
    if not name:
        return ""
    spec = spec_of(facts)
    source = f" ({spec.hub_repo} on the Hugging Face hub)" if spec else ""
    weights = facts.known("features", "weights_sha256") or "not stated"
    kind = "weights sha256" if len(weights) == 64 else "weights:"
    return f"Encoder {name}{source}, frozen; {kind} {weights}."


def licence(facts: Facts) -> str:
    """Of the encoder's weights, which what is trained on its features inherits, and of this toolkit."""
    spec = spec_of(facts)
    known = f"Encoder weights: {spec.licence}" if spec else "Encoder weights: not in this toolkit's table"
    return f"{known}. slide-mil: Apache-2.0."


def tiles(facts: Facts) -> str:
    """How slides become features."""
    made = facts.known("features")
    if not isinstance(made, Mapping):
        return ""
    size = f"{made['tile_px']} px at {made['mpp']:g} microns per pixel" if made.get("tile_px") else "size not stated"
    overlap = f", overlapping by {made['overlap_px']} px" if made.get("overlap_px") else ""
    tissue = " within a tissue mask" if made.get("extraction") else ""
    width = f"; {made['dim']} features a tile, stored as {made['dtype']}" if made.get("dim") else ""
    return f"Tiles of {size}{overlap}{tissue}{width}. {standardized(facts)}".strip()


def standardized(facts: Facts) -> str:
    """Whether features are rescaled."""
    standardize, harmonize = (facts.setting("train", key) for key in ("standardize", "harmonize"))
    if standardize is None:
        return ""
    ways = ["standardised"] if standardize else []
    ways += [f"harmonised between sites ({harmonize})"] if harmonize not in (None, "none") else []
    if not ways:
        return "Features are used as the encoder gives them."
    return f"Features are {' and '.join(ways)} by each member's own training slides."


def predictors(facts: Facts) -> str:
    """That no predictor was chosen by hand."""
    if not tiles(facts):
        return ""
    most = facts.setting("data", "max_tiles")
    which = f"{most} random tiles of tissue a slide and epoch" if most else "All tiles of tissue of a slide"
    named = facts.setting("columns", "covariates") or []
    clinical = f"; clinical variables of the patient: {', '.join(named)}" if named else ", and no clinical variables"
    return f"{which}; no selection by hand{clinical}."


# --- the model -------------------------------------------------------------------------------------------------------


def aggregator(facts: Facts) -> str:
    """Name and options of what is trained."""
    name = facts.known("study", "aggregator") or facts.known("aggregator")
    if not name:
        return ""
    given = {k: v for k, v in (facts.config.get("model") or {}).items() if k not in ("name", "init", "init_from")}
    own = given.get(name) if isinstance(given.get(name), Mapping) else {}
    options = {k: v for k, v in given.items() if not isinstance(v, Mapping)} | dict(own or {})
    said = f" ({', '.join(f'{k} {v}' for k, v in options.items())})" if options else ""
    what = "target" if facts.of_task else "label"
    return f"{name}{said}: multiple-instance learning, one {what} a slide, on the features of its tiles."


def recipe(facts: Facts) -> str:
    """Optimiser, learning rate, epochs and batch."""
    members, name = facts.members, facts.setting("train", "optimizer")
    if not members or not name or facts.of_another_study:
        return ""
    lr, decay, epochs = (sorted({m[key] for m in members}) for key in ("lr", "weight_decay", "epochs"))
    parts = [f"{name}, learning rate {_ends(lr)}, weight decay {_ends(decay)}, {_ends(epochs)} epochs"]
    parts += [f"batches of {facts.setting('train', 'batch_size')} slides"]
    parts += [f"schedule {facts.setting('train', 'schedule')}, precision {facts.setting('train', 'precision')}"]
    return "; ".join(parts) + f". {selection(facts)}"


def _ends(values: Sequence[float]) -> str:
    return f"{values[0]:g}" + (f" to {values[-1]:g}" if values[-1] > values[0] else "")


def selection(facts: Facts) -> str:
    """What chose settings and epoch."""
    if facts.of_another_study:
        return ""
    nested, select = facts.setting("study", "nested"), facts.setting("train", "select")
    if nested:
        cells = len(facts.metrics.get("nested", {}).get("cells", ()))
        return (
            f"{nested} inner folds chose among {count(cells, 'setting')} and the number of epochs; test folds did not."
        )
    if select == "best":
        return f"Each member keeps its best epoch by {facts.setting('train', 'metric')} on its val slides."
    return "No setting was tuned in this run; each member keeps its last epoch." if select else ""


def start(facts: Facts) -> str:
    """Initial parameters."""
    init, seeds = facts.setting("model", "init"), facts.setting("study", "seeds")
    if init:
        return f"Parameters start from those of an earlier study ({init}); the encoder is pre-trained."
    return f"Random, seeds {', '.join(map(str, seeds))}; the encoder is pre-trained and frozen." if seeds else ""


def ensemble(facts: Facts) -> str:
    """How members are put together."""
    test = facts.metrics["test"]
    if test:
        return f"A test slide gets the {test['method']}."
    said = "what members say that" if facts.of_task else "the logits of the members that"
    pooled = facts.metrics["pooled_out_of_fold"]
    return f"A slide gets the mean of {said} held it out." if pooled else ""


def output(facts: Facts) -> str:
    """Probabilities and thresholds."""
    if facts.of_task:
        return task_facts.output(facts.metrics)
    positive, classes = facts.metrics["positive_class"], facts.metrics["classes"]
    if positive is None:
        return f"Probabilities of {', '.join(classes)}, of a slide; the highest one is the prediction."
    origins = sorted({one["origin"] for one in facts.metrics["thresholds"]})
    said = f"The probability of {positive} (against {classes[0]}), of a slide and as their mean of a patient"
    return f"{said}; threshold: {'; '.join(origins)}. Reported slides choose none."


def imbalance(facts: Facts) -> str:
    """Class weights."""
    if facts.of_task:
        return task_facts.imbalance(facts.metrics)
    weights = facts.setting("train", "class_weights")
    said = {"none": "The loss does not weight classes.", "balanced": "The loss weights classes by inverse frequency."}
    return said.get(str(weights), "")


def recalibration(facts: Facts) -> str:
    """Whether probabilities were changed after training."""
    method = facts.setting("report", "calibrate")
    return f"Probabilities are calibrated ({method})." if method not in (None, "none") else "None in this run."


def how_to_predict(facts: Facts) -> str:
    """What it takes to use the model on new slides."""
    return (
        "python -m mil.predict applies the members in members.safetensors, with config.yaml and environment.json "
        "beside them, to new slides; features must come from the same encoder, weights and tile size, which is checked."
    )


def software(facts: Facts) -> str:
    """Toolkit, Python and packages."""
    known = {"slide-mil": facts.known("slide-mil"), "Python": facts.known("python"), **(facts.known("versions") or {})}
    return ", ".join(f"{name} {version}" for name, version in known.items() if version) + "."


def code(facts: Facts) -> str:
    """Version and command that make the numbers again."""
    command = facts.known("command")
    again = " ".join(word for word in str(command or "").split() if word not in ("resume=true", "overwrite=true"))
    made = f"; command: {again}" if again else ""
    return f"slide-mil {facts.known('slide-mil')}{made}." if facts.known("slide-mil") else ""


# --- results ---------------------------------------------------------------------------------------------------------


def measures(facts: Facts) -> str:
    """Metrics, figures and intervals."""
    names, n = ", ".join(facts.titles.values()), facts.metrics["bootstrap"]["resamples"]
    curves = "" if facts.of_task else "; ROC, precision-recall and calibration curves"
    return f"{names}{curves}. {intervals(facts)}" if n else f"{names}."


def intervals(facts: Facts) -> str:
    """How the uncertainty of numbers was measured."""
    block = facts.metrics["bootstrap"]
    if not block["resamples"]:
        return "No intervals were computed."
    how = interval_methods(facts) or f"{block['resamples']} resamples of patients with all their slides"
    return f"{100 * block['level']:g} % intervals: {how}; over folds: mean and SD."


def interval_methods(facts: Facts) -> str:
    """Each method of an interval with the metrics that have it; "" where metrics.json does not name them."""
    _, block = best_set(facts)
    methods = facts.metrics.get("intervals", {}).get("methods", {})
    having: dict[str, list[str]] = {}
    for name, number in (block["metrics"] if block else {}).items():
        if number.get("method") in methods:
            having.setdefault(number["method"], []).append(facts.titles[name])
    return "; ".join(f"{', '.join(names)}: {methods[method]}" for method, names in having.items())


def results(facts: Facts) -> str:
    """The AUC (of other tasks their main metric) of folds, pooled and of the test ensemble, with their intervals."""
    m, found, main = facts.metrics, [], main_metric(facts.metrics)
    if m["cross_validation"]:
        found.append(f"folds {mean_sd(m['cross_validation']['metrics'][main])} (mean ± SD)")
    if m["pooled_out_of_fold"]:
        found.append(f"out-of-fold, pooled {value_interval(m['pooled_out_of_fold']['metrics'][main])}")
    if m["test"]:
        found.append(f"test, ensemble {value_interval(m['test']['ensemble']['metrics'][main])}")
    return _sentence(f"{auc_name(dict(m))}: {'; '.join(found)}") if found else ""


def accuracy(facts: Facts) -> str:
    """Sensitivity, specificity and balanced accuracy of the most honest set there is; of other tasks all metrics."""
    name, block = best_set(facts)
    if facts.of_task:
        return task_facts.results(facts.metrics, block, name)
    if block is None:
        return ""
    said = [f"{METRICS[key].title.lower()} {value_interval(block['metrics'][key])}" for key in KEY_METRICS]
    return f"{name}: " + ", ".join(said) + "."


KEY_METRICS = ("sensitivity", "specificity", "balanced_accuracy")


def best_set(facts: Facts) -> tuple[str, Mapping[str, Any] | None]:
    """The test ensemble, else the pooled out-of-fold predictions."""
    if facts.metrics["test"]:
        return "Test, ensemble", facts.metrics["test"]["ensemble"]
    return "Out-of-fold, pooled", facts.metrics["pooled_out_of_fold"]


def calibration(facts: Facts) -> str:
    """Brier score and calibration error."""
    name, block = best_set(facts)
    if facts.of_task:
        return task_facts.calibration(facts.metrics, block)
    if block is None:
        return ""
    brier, ece = (block["metrics"][key]["value"] for key in ("brier", "ece"))
    return f"{name}: Brier score {shown(brier)}, expected calibration error {shown(ece)}."


def mistakes(facts: Facts) -> str:
    """Counts off the diagonal of the confusion matrix."""
    name, block = best_set(facts)
    if facts.of_task:
        return task_facts.mistakes(facts.metrics, block, name)
    matrix = block and block["confusion"]["matrix"]
    if not matrix:
        return ""
    total = sum(map(sum, matrix))
    wrong = total - sum(row[i] for i, row in enumerate(matrix))
    return f"{name}: {wrong} of {count(total, 'slide')} wrong; confusion matrix, most wrong slides and heatmaps above."


def shown_in(block: str, what: str) -> Callable[[Facts], str]:
    """That the report has a section of its own about it, where metrics.json has the block."""
    return lambda facts: f"{what}: shown in the report." if facts.metrics.get(block) else ""


subgroups = shown_in("subgroups", "Performance by group of patients")
sites = shown_in("confounding", "What tells sites apart, and performance within sites and on sites left out")
baselines = shown_in("baselines", "Simple models on the same folds")
operating_points = shown_in("operating_points", "Operating points and a decision curve")
sets_of_classes = shown_in("conformal", "Prediction sets with their coverage")


def conformal(facts: Facts) -> str:
    """Sets of classes or grades, intervals of numbers, or why there are none."""
    return sets_of_classes(facts) or (task_facts.unknowing(facts.metrics) if facts.of_task else "")


permutations = shown_in("permutations", "A permutation test of the whole study")


def external(facts: Facts) -> str:
    """Whether the slides are new to the members."""
    if facts.of_another_study:
        return f"These are slides of another cohort than the study's. {results(facts)}"
    return ""


def internal(facts: Facts) -> str:
    """What was tested on data of the same cohort."""
    return "" if facts.of_another_study else f"{split(facts)} {results(facts)}"


def limits(facts: Facts) -> str:
    """What the run itself knows to be weak in it."""
    found = [*(facts.metrics.get("warnings") or ()), *(note for note in facts.notes if not is_of_dropped(note))]
    found = list(dict.fromkeys(found))
    if not facts.of_another_study:
        found.append("All slides are of one cohort as given: other hospitals and scanners may differ")
    if facts.setting("study", "nested") == 0 and not facts.of_another_study:
        found.append("one setting was trained; how it was chosen is not part of the run")
    if not facts.metrics["bootstrap"]["resamples"]:
        found.append("no intervals")
    return " ".join(_sentence(text.rstrip(".")) for text in found)


def explanation(facts: Facts) -> str:
    """Heatmaps, and what they do not say."""
    return (
        "Heatmaps of tile scores (python -m mil.heatmap). A high score says where members looked, not that there is "
        "disease; that was not validated in this run."
    )


def robustness(facts: Facts) -> str:
    """Repeats, seeds and training sizes that vary the study."""
    block = facts.metrics["cross_validation"]
    sd = block and block["metrics"][main_metric(facts.metrics)]["sd"]
    curve = " A learning curve is above." if facts.metrics.get("learning_curve") else ""
    name = facts.titles[main_metric(facts.metrics)]
    return f"SD of the {name} over folds {shown(sd)}.{curve}" if sd is not None else curve.strip()
