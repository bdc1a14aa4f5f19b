"""Answers of the model card and the checklists that a task other than classification words in its own way.

Each function takes what metrics.json holds and gives a sentence or two, or "" where the run does not know.
`mil.report.facts` asks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extract.wording import count
from mil.report.wording import shown, value_interval

Metrics = Mapping[str, Any]
PARTS = (("cross_validated", "cross-validated"), ("test", "held-out test"))


def of_task(metrics: Metrics) -> bool:
    """Whether the run is of a task other than classification."""
    return "metric_titles" in metrics


def target(metrics: Metrics) -> str:
    """What is to be predicted, and how much of it there is."""
    task, unit = metrics["task"], unit_of(metrics)
    if task["name"] == "regression":
        ends = task["target"]
        return (
            f"Target: a number{unit}, from {ends['min']:.4g} to {ends['max']:.4g}, mean {ends['mean']:.4g} over the "
            "slides that have one."
        )
    found = []
    for key, text in PARTS:
        counts = metrics["counts"][key]
        if counts["slides"]:
            found.append(f"{text}: " + ", ".join(f"{n} {name}" for name, n in counts["target"].items()))
    what = {"survival": f"Target: the time{unit} to an event, patients", "ordinal": "Target: a grade, slides of each"}
    return f"{what[task['name']]}, {'; '.join(found)}." if found else ""


def unit_of(metrics: Metrics) -> str:
    unit = metrics["task"].get("unit")
    return f" in {unit}" if unit else ""


def strata(metrics: Metrics) -> str:
    """By what the folds are stratified."""
    return {
        "survival": "folds are stratified by whether the event was seen",
        "regression": "folds are stratified by fifths of the patients' target, or fewer parts of it",
        "ordinal": "folds are stratified by grade",
    }[metrics["task"]["name"]]


def output(metrics: Metrics) -> str:
    """What a member's outputs mean."""
    task = metrics["task"]
    if task["name"] == "regression":
        return f"The target{unit_of(metrics)}, of a slide; no threshold is chosen."
    if task["name"] == "ordinal":
        grades = ", ".join(task["grades"])
        return f"Probabilities of the grades {grades}; the grade is the number of cuts passed with more than one half."
    curve = " and the share without an event at times between the horizons" if task["loss"] == "discrete" else ""
    return (
        f"A risk of a patient, the mean of the slides',{curve} and the group above or below the median risk of each "
        "member's own training patients. Reported patients choose no threshold."
    )


def imbalance(metrics: Metrics) -> str:
    """That losses of these tasks weigh all alike."""
    weighed = {"survival": "censored patients and those with an event", "ordinal": "grades", "regression": "values"}
    return f"The loss does not weight {weighed[metrics['task']['name']]}."


def results(metrics: Metrics, block: Metrics | None, name: str) -> str:
    """The metrics beside the main one, of the set that is the most honest."""
    if block is None:
        return ""
    main, titles = metrics["task"]["main"], metrics["metric_titles"]
    said = [f"{titles[key]} {value_interval(number)}" for key, number in block["metrics"].items() if key != main]
    return f"{name}: {', '.join(said)}."


def calibration(metrics: Metrics, block: Metrics | None) -> str:
    """Where calibration is shown; what metrics.json holds of it as `task_calibration`."""
    if metrics.get("task_calibration"):
        return "Predicted against observed: shown in the report, with slope or gaps and their intervals."
    if metrics["task"]["name"] == "survival":
        return "A risk is an order, not a probability: there is nothing to calibrate."
    return ""


def mistakes(metrics: Metrics, block: Metrics | None, name: str) -> str:
    """Of grades the counts off the diagonal, of numbers the mean error."""
    if block is None:
        return ""
    if metrics["task"]["name"] == "ordinal":
        matrix = block["confusion"]["matrix"]
        total = sum(map(sum, matrix))
        wrong = total - sum(row[i] for i, row in enumerate(matrix))
        return f"{name}: {wrong} of {count(total, 'slide')} have another grade; table of grades and heatmaps above."
    if metrics["task"]["name"] == "regression":
        error = block["metrics"]["mae"]["value"]
        return f"{name}: mean absolute error {shown(error)}{unit_of(metrics)}; residuals and heatmaps above."
    return ""


def unknowing(metrics: Metrics) -> str:
    """What the report says where a prediction should not be trusted."""
    if metrics.get("conformal_intervals"):
        return "Prediction intervals with their coverage: shown in the report."
    if metrics["task"]["name"] == "survival":
        return "No prediction sets: none are known here for censored times."
    return ""
