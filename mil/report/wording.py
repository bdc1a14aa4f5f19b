"""Numbers of `metrics.json` as text: the tables for the terminal and for Markdown, and how a number is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from extract.wording import p_value
from mil.results.trainings import FEWEST

UNDEFINED = "undefined"


def terminal_table(metrics: dict[str, Any]) -> str:
    """A few aligned lines: AUC of the folds, pooled, of the test members and of the test ensemble."""
    if "metric_titles" in metrics:
        return task_table(metrics)
    folds = metrics["folds"]
    test = metrics["test"]
    lines = []
    if metrics["cross_validation"]:
        summary = metrics["cross_validation"]["metrics"]["auc"]
        repeats = sorted({fold["repeat"] for fold in folds})
        listed = [[shown(f["metrics"]["auc"]) for f in folds if f["repeat"] == r] for r in repeats]
        text = " ".join(listed[0]) if len(repeats) == 1 and len(listed[0]) <= 10 else ""
        said = folds_in_words(folds) + spread_of_seeds(summary)
        lines.append(("cross-validation, mean ± SD", mean_sd(summary), f"{said}{': ' + text if text else ''}"))
        if not text:
            for r, values in list(zip(repeats, listed, strict=True))[:5]:
                more = f" and {len(values) - 10} more" if len(values) > 10 else ""
                lines.append((f"  repeat {r}", "", " ".join(values[:10]) + more))
            if len(repeats) > 5:
                lines.append(("", "", f"{len(repeats) - 5} more repeats in metrics.json"))
    if "nested" in metrics:
        lines += nested_lines(metrics["nested"])
    if metrics["pooled_out_of_fold"]:
        lines += ensemble_lines("out-of-fold, pooled", metrics["pooled_out_of_fold"])
    if test:
        values = [shown(member["metrics"]["auc"]) for member in test["members"]]
        text = f"{len(values)} members" + (": " + " ".join(values) if len(values) <= 10 else "")
        lines.append(("test, mean ± SD of members", mean_sd(test["over_members"]["auc"]), text))
        lines += ensemble_lines(
            "test, ensemble of members", test["ensemble"], test.get("single_training"), test.get("with_training")
        )
    for point in (metrics.get("learning_curve") or {"points": []})["points"]:
        block = point["cross_validation"] or point["test"]
        size = "all patients" if point["train_size"] is None else f"{point['train_size']} patients"
        lines.append((f"trained on {size}", mean_sd(block["metrics"]["auc"]), trained_on(point)))
    widths = [max((len(line[i]) for line in lines), default=0) for i in (0, 1)]
    head = f"{auc_name(metrics)}; {about_intervals(metrics)}"
    rows = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in lines]
    told = [*metrics.get("nested", {}).get("notes", []), *about_training_again(metrics)]
    notes = [f"  note: {text}" for text in [*told, *about_baselines(metrics.get("baselines"))]]
    return "\n".join([head, *(rows or ["  nothing was held out: no metric"]), *notes])


def about_intervals(metrics: Mapping[str, Any]) -> str:
    """What the terminal says of the intervals of the AUC."""
    if not metrics["bootstrap"]["resamples"]:
        return "no intervals (report.bootstrap=0)"
    if "intervals" not in metrics:  # a study of an earlier version
        return f"95 % intervals from {metrics['bootstrap']['resamples']} resamples of patients"
    kind = "score intervals" + (" of each class combined (MOVER)" if len(metrics["classes"]) > 2 else "")
    return f"95 % {kind}, patients as clusters"


def about_training_again(metrics: Mapping[str, Any]) -> list[str]:
    """That intervals leave out training again, where there are intervals and one training only."""
    blocks = [block for block in (metrics["pooled_out_of_fold"], metrics["test"]) if block]
    known = [
        bool(block["with_training"]) and block["with_training"]["auc"]["low"] is not None
        for block in blocks
        if "with_training" in block
    ]
    if not known or any(known) or not metrics["bootstrap"]["resamples"]:
        return []
    return [f"intervals leave out training again; {FEWEST} trainings or more tell (study.repeats or study.seeds)"]


def about_baselines(block: Mapping[str, Any] | None) -> list[str]:
    """A sentence a set of slides on which the aggregator is not better than all baselines."""
    if not block:
        return []
    titles = {rung["name"]: rung["title"] for rung in block["rungs"]}
    said = []
    of_test = "new" if block.get("new") else "official test"
    for where, name in (("out_of_fold", "out-of-fold"), ("test", of_test)):
        verdict = block["verdict"].get(where, {})
        equal, worse = ([titles[n] for n in verdict.get(k, [])] for k in ("not_better_than", "worse_than"))
        parts = [f"not shown to be better than {'; '.join(equal)}"] if equal else []
        parts += [f"worse than {'; '.join(worse)}"] if worse else []
        if parts:
            said.append(f"on the {name} slides {block['aggregator']} is {', and '.join(parts)}")
    return said


def task_table(metrics: dict[str, Any]) -> str:
    """The same for a task other than classification: a line a metric."""
    kind = "95 % intervals, patients as clusters" if metrics["bootstrap"]["resamples"] else "no intervals"
    head = f"{metrics['task']['name']}; {kind}"
    sets = (("out-of-fold", metrics["pooled_out_of_fold"]), ("test", (metrics["test"] or {}).get("ensemble")))
    width, lines = max(map(len, metrics["metric_titles"].values())), []
    for name, title in metrics["metric_titles"].items():
        folds = metrics["cross_validation"]
        cells = [f"folds {mean_sd(folds['metrics'][name])}"] if folds else []
        cells += [f"{text} {value_interval(block['metrics'][name])}" for text, block in sets if block]
        lines.append(f"  {title:<{width}}  {'; '.join(cells) or 'nothing was held out'}")
    main = main_metric(metrics)
    for point in (metrics.get("learning_curve") or {"points": []})["points"]:
        block = point["cross_validation"] or point["test"]
        size = "all" if point["train_size"] is None else str(point["train_size"])
        figure = mean_sd(block["metrics"][main])
        lines.append(f"  trained on {size} patients: {metrics['metric_titles'][main]} {figure} ({trained_on(point)})")
    lines += [f"  note: {text}" for text in about_baselines(metrics.get("baselines"))]
    return "\n".join([head, *lines])


def trained_on(point: Mapping[str, Any]) -> str:
    """`80 slides, 125 epochs`; without the epochs where metrics.json is older than that."""
    return f"{point['slides']:.0f} slides" + (f", {point['epochs']:.0f} epochs" if "epochs" in point else "")


def nested_lines(nested: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What nested cross-validation chose and how far the inner score can be trusted."""
    stability, cells = nested["stability"], nested["cells"]
    most = cells[stability["most_chosen"]]
    epochs, n = stability["epochs"], len(nested["choices"])
    choice = f"lr {most['lr']:g}, weight decay {most['weight_decay']:g} in {most['chosen']} of {n}"
    span = f"epochs {epochs['min']} to {epochs['max']}, median {epochs['median']:g}"
    inner = plain_mean_sd(nested["inner_auc"])
    return [
        ("  inner folds, of the choice", inner, f"{choice}; {span}"),
        (
            "  optimism, inner - outer",
            plain_mean_sd(nested["optimism"], sign="+"),
            "inner members trained on fewer slides, which lowers it",
        ),
    ]


def plain_mean_sd(summary: dict[str, Any], sign: str = "") -> str:
    """`0.931 ± 0.020`, with a sign if asked for; SD left out when there is one value."""
    if summary["mean"] is None:
        return UNDEFINED
    return f"{summary['mean']:{sign}.3f}" + ("" if summary["sd"] is None else f" ± {summary['sd']:.3f}")


def ensemble_lines(
    text: str,
    block: dict[str, Any],
    single: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> list[tuple[str, str, str]]:
    """The figure of an ensemble, and below it that of one training alone where several are behind a slide."""
    n, single = block["counts"], single or block.get("single_training")
    lines = [
        (
            text,
            value_interval(block["metrics"]["auc"]),
            f"{n['slides']} slides, {n['patients']} patients{models_in_words(block)}",
        )
    ]
    again = training or block.get("with_training")
    if again and again["auc"]["low"] is not None:
        number = again["auc"]
        interval = f"      [{shown(number['low'])}, {shown(number['high'])}]"
        said = f"the interval that holds training again, from {again['trainings']} trainings"
        lines.append(("  trained again", interval, said))
    if single:
        said = f"mean ± SD of {single['trainings']} trainings{models_in_words(single)}"
        lines.append(("  one training alone", mean_sd(single["metrics"]["auc"]), said))
    return lines


def models_in_words(block: dict[str, Any]) -> str:
    """`; 5 models a slide`, nothing where metrics.json is older than that."""
    fewest, most = block.get("models_per_slide") or (None, None)
    if fewest is None:
        return ""
    return f"; {fewest if fewest == most else f'{fewest} to {most}'} {'model' if most == 1 else 'models'} a slide"


def folds_in_words(folds: Sequence[Mapping[str, Any]]) -> str:
    """`5 folds`, `5 folds x 5 seeds`, `25 folds (5 repeats) x 2 seeds`."""
    n = len({(fold["repeat"], fold["fold"]) for fold in folds})
    repeats, seeds = (len({fold[name] for fold in folds}) for name in ("repeat", "seed"))
    text = f"{n} {'fold' if n == 1 else 'folds'}" + (f" ({repeats} repeats)" if repeats > 1 else "")
    return text + (f" x {seeds} seeds" if seeds > 1 else "")


def spread_of_seeds(summary: Mapping[str, Any]) -> str:
    """The SD of the seeds within a fold, where there are several."""
    sd = summary.get("sd_seeds")
    return "" if sd is None else f"; SD of seeds {shown(sd)}"


OVERVIEW = ("", "cross-validation", "out-of-fold, pooled", "test ensemble")
DIFFERENCES = ("difference in AUC", "set", "a - b", "DeLong's p")
OF_TASKS = ("difference", "set", "metric", "a - b")


def overview_text(studies: Mapping[str, dict[str, Any]], differences: pd.DataFrame | None = None) -> str:
    """One line a study, then one a difference, aligned."""
    rows = overview_rows(studies)
    head = f"{auc_name(next(iter(studies.values())))}: mean ± SD of folds; [95 % interval over patients]"
    said = [*about_models(studies), *about_settings(studies)]
    lines = [head, *aligned([OVERVIEW, *rows]), *(f"  {text}" for text in said)]
    pairs = difference_rows(differences)
    if pairs:
        lines += ["", *aligned([heads_of(differences), *pairs]), *(f"  {text}" for text in about_training(differences))]
    return "\n".join(lines)


def overview_markdown(studies: Mapping[str, dict[str, Any]], differences: pd.DataFrame | None = None) -> str:
    """The same tables for a paper or a page."""
    lines = [f"{auc_name(next(iter(studies.values())))}: mean ± SD of folds, [95 % interval over patients].", ""]
    lines += markdown_table(OVERVIEW, overview_rows(studies))
    said = [*about_models(studies), *about_settings(studies)]
    lines += ["", *(f"- {text}" for text in said)] if said else []
    pairs = difference_rows(differences)
    if pairs and heads_of(differences) == OF_TASKS:
        lines += ["", "Paired: the same resamples of patients for both; [95 % interval].", ""]
        lines += [*markdown_table(OF_TASKS, pairs), "", *about_training(differences)]
    elif pairs:
        lines += [
            "",
            "Paired, [95 % interval]; intervals and DeLong's test take patients as clusters (Obuchowski 1997).",
            "",
        ]
        lines += [*markdown_table(DIFFERENCES, pairs), "", *about_training(differences)]
    return "\n".join(lines) + "\n"


def heads_of(differences: pd.DataFrame | None) -> tuple[str, ...]:
    """Of the columns of `difference_rows`."""
    return OF_TASKS if differences is not None and "metric" in differences else DIFFERENCES


SEVERAL_SEEDS = "study.seeds=[0,1,2,3,4]"


def about_training(differences: pd.DataFrame | None) -> list[str]:
    """Whether the intervals of differences hold the chance in training, and what to do where they do not."""
    if differences is None or differences.empty:
        return []
    if "metric" in differences:
        return [
            "Intervals are of these trained members, over other patients: they leave out the chance in training. A",
            "metric that is low where it is good has a negative difference where the first is better.",
        ]
    fewest = int(differences["trainings"].min())
    if fewest < FEWEST:
        return [
            "Intervals and p leave out the chance in training: trained again with another seed, a run differs from",
            f"itself. Train each with {FEWEST} seeds or more ({SEVERAL_SEEDS}) to have it in the intervals.",
        ]
    few = "" if fewest > 4 else f"With fewer than five they are wide: {SEVERAL_SEEDS}."
    return [
        f"Intervals hold the chance in training: the variance between {fewest} trainings a run (repeats x seeds).",
        f"{few} DeLong's p leaves it out.".strip(),
    ]


SMALL_GRID = "study.nested=5 study.grid.lr=[1e-2,1e-3,1e-4]"


def about_settings(studies: Mapping[str, dict[str, Any]]) -> list[str]:
    """That each had one setting, which, and how to let inner folds choose it; nothing where they did choose."""
    names: dict[str, list[str]] = {}
    for name, metrics in studies.items():
        if "nested" not in metrics and (metrics["folds"] or metrics["test"]):
            names.setdefault(setting_of(metrics), []).append(name)
    if not names:
        return []
    alike = [*names.values()] == [[*studies]]
    each = "; ".join(setting if alike else f"{setting}: {', '.join(own)}" for setting, own in names.items())
    return [
        f"One setting each ({each}); a difference may be one of settings.",
        f"To let inner folds choose: {SMALL_GRID}",
    ]


def setting_of(metrics: dict[str, Any]) -> str:
    """`lr 0.001, 50 epochs` of a study's members; the ends where members differ."""
    members = metrics["folds"] or metrics["test"]["members"]
    (lr, last_lr), (epochs, last) = ((min(v), max(v)) for v in ([m[k] for m in members] for k in ("lr", "epochs")))
    text = f"lr {lr:g}" + (f" to {last_lr:g}" if last_lr > lr else "")
    return f"{text}, {epochs}" + (f" to {last}" if last > epochs else "") + f" {'epoch' if last == 1 else 'epochs'}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def overview_rows(studies: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Name, folds, pooled out-of-fold and test ensemble of every study, as text."""
    rows: list[tuple[str, ...]] = []
    for name, metrics in studies.items():
        cells, main = ["-", "-", "-"], main_metric(metrics)
        if metrics["cross_validation"]:
            cells[0] = mean_sd(metrics["cross_validation"]["metrics"][main])
        if metrics["pooled_out_of_fold"]:
            cells[1] = value_interval(metrics["pooled_out_of_fold"]["metrics"][main])
        if metrics["test"]:
            cells[2] = value_interval(metrics["test"]["ensemble"]["metrics"][main])
        rows.append((name, *cells))
    return rows


def difference_rows(differences: pd.DataFrame | None) -> list[tuple[str, ...]]:
    """Pair, set, difference with interval, p, as text."""
    rows: list[tuple[str, ...]] = []
    for row in [] if differences is None else differences.astype(object).to_dict("records"):
        numbers = (row.get(key) for key in ("difference", "low", "high", "delong_p"))
        value, low, high, p = (None if pd.isna(number) else float(number) for number in numbers)
        text = UNDEFINED if value is None else f"{value:+.3f}"
        if value is not None and low is not None:
            text += f" [{low:+.3f}, {high:+.3f}]"
        if "title" in row:
            rows.append((f"{row['a']} - {row['b']}", str(row["set"]), str(row["title"]), text))
            continue
        shown_p = "-" if p is None else p_value(p)
        rows.append((f"{row['a']} - {row['b']}", str(row["set"]), text, shown_p))
    return rows


def comparison_table(studies: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a study: cv_auc_mean, cv_auc_sd (of folds), cv_folds, cv_auc_sd_seeds, then value, low and high of
    out-of-fold and test ensemble, and oof_auc_one, test_auc_one: the mean of single trainings, where there are several.

    Of a task other than classification its main metric stands for the AUC, with its name in the columns'.
    """
    rows = []
    for name, metrics in studies.items():
        _, pooled, test = headline(metrics)
        main = main_metric(metrics)
        cv = metrics["cross_validation"]["metrics"][main] if metrics["cross_validation"] else {}
        row = {
            "name": name,
            f"cv_{main}_mean": cv.get("mean"),
            f"cv_{main}_sd": cv.get("sd"),
            "cv_folds": len({(fold["repeat"], fold["fold"]) for fold in metrics["folds"]}),
            f"cv_{main}_sd_seeds": cv.get("sd_seeds"),
        }
        row |= {f"oof_{main}": pooled.value, f"oof_{main}_low": pooled.low, f"oof_{main}_high": pooled.high}
        row |= {f"test_{main}": test.value, f"test_{main}_low": test.low, f"test_{main}_high": test.high}
        for key, single in ((f"oof_{main}_one", single_of(metrics, 0)), (f"test_{main}_one", single_of(metrics, 1))):
            row[key] = single["metrics"][main]["mean"] if single else None
        rows.append(row)
    return pd.DataFrame(rows)


def single_of(metrics: Mapping[str, Any], which: int) -> dict[str, Any] | None:
    """What single trainings reach, 0: out-of-fold, 1: on the test split; None: there is one, or an old metrics.json."""
    block = metrics["test" if which else "pooled_out_of_fold"] or {}
    single: dict[str, Any] | None = block.get("single_training")
    return single


def about_models(studies: Mapping[str, dict[str, Any]]) -> list[str]:
    """Of studies whose pooled figures are those of several trainings together: what one alone reaches, a line a set."""
    lines = []
    for name, metrics in studies.items():
        for text, single, block in (
            ("out-of-fold", single_of(metrics, 0), metrics["pooled_out_of_fold"] or {}),
            ("test", single_of(metrics, 1), (metrics["test"] or {}).get("ensemble", {})),
        ):
            if single:
                together = f"all {single['trainings']} together, as above{models_in_words(block)}"
                lines.append(f"{name}, {text}, one training alone: {mean_sd(single['metrics']['auc'])} ({together})")
    return lines


class Headline(NamedTuple):
    """An AUC with the ends of its line in a figure; None where undefined or absent."""

    value: float | None
    low: float | None
    high: float | None


def headline(metrics: dict[str, Any]) -> tuple[Headline, Headline, Headline]:
    """The main metric over folds (low and high: mean -+ SD), pooled and of the test ensemble (95 % interval)."""
    folds = ensemble = pooled = Headline(None, None, None)
    main = main_metric(metrics)
    if metrics["cross_validation"]:
        cv = metrics["cross_validation"]["metrics"][main]
        ends = (
            (None, None) if cv["sd"] is None or cv["mean"] is None else (cv["mean"] - cv["sd"], cv["mean"] + cv["sd"])
        )
        folds = Headline(cv["mean"], *ends)
    if metrics["pooled_out_of_fold"]:
        number = metrics["pooled_out_of_fold"]["metrics"][main]
        pooled = Headline(number["value"], number["low"], number["high"])
    if metrics["test"]:
        number = metrics["test"]["ensemble"]["metrics"][main]
        ensemble = Headline(number["value"], number["low"], number["high"])
    return folds, pooled, ensemble


def main_metric(metrics: Mapping[str, Any]) -> str:
    """The metric that stands first: the task's own."""
    return str(metrics["task"]["main"]) if "metric_titles" in metrics else "auc"


CORRELATIONS = ("pearson", "kappa")
"""Main metrics that are 0 by chance and may be below; the others are 0.5."""


def short_name(metrics: Mapping[str, Any]) -> str:
    """What it is called on an axis."""
    if "metric_titles" in metrics:
        return str(metrics["metric_titles"][main_metric(metrics)])
    return "AUC" if metrics["positive_class"] else "macro AUC"


def auc_name(metrics: dict[str, Any]) -> str:
    """What that metric is called."""
    if "metric_titles" in metrics:
        return str(metrics["metric_titles"][main_metric(metrics)])
    if metrics["positive_class"] is None:
        return f"macro AUC of {len(metrics['classes'])} classes, one against the rest"
    return f"AUC of {metrics['positive_class']!r} against {metrics['classes'][0]!r}"


def value_interval(number: dict[str, Any]) -> str:
    """`0.931 [0.890, 0.962]`, `0.931` without an interval, `undefined`."""
    if number["low"] is None:
        return shown(number["value"])
    return f"{shown(number['value'])} [{shown(number['low'])}, {shown(number['high'])}]"


def mean_sd(summary: dict[str, Any]) -> str:
    """`0.931 ± 0.020`; SD left out when there is one value; how many were undefined."""
    text = shown(summary["mean"]) + ("" if summary["sd"] is None else f" ± {shown(summary['sd'])}")
    return text + (f" ({summary['undefined']} undefined)" if summary["undefined"] and summary["n"] else "")


def shown(number: float | None) -> str:
    """Three decimals, or `undefined`."""
    return UNDEFINED if number is None or np.isnan(number) else f"{number:.3f}"
