"""SECTIONS: what a report shows of the blocks that stand in metrics.json beside the metrics themselves.

To add one: a block (`mil.pipeline.blocks`), a template with its name in `templates/`, a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from mil.report.figures_confounding import confounding_figure
from mil.report.figures_decisions import answered_figure, decision_figure, reliability_figure
from mil.report.figures_flow import flow_figure
from mil.report.figures_left_out_sites import left_out_figure
from mil.report.figures_permutations import null_figure
from mil.report.figures_subgroups import forest_figure
from mil.report.figures_task_calibration import task_calibration_figure
from mil.report.figures_variants import variants_figure


@dataclass(frozen=True)
class Drawing:
    """A figure of a section: `draw` gets all that metrics.json holds; None where there is nothing to draw."""

    name: str
    heading: str
    caption: str
    draw: Callable[[Mapping[str, Any]], Figure | None]


@dataclass(frozen=True)
class Section:
    """A heading, the template `templates/NAME.html`, which writes the numbers of block NAME, and figures below it."""

    heading: str
    figures: tuple[Drawing, ...] = ()


FOREST = "Squares: each group with its 95 % interval; diamond and dashed line: all slides of the set. n: slides."

AGAINST = (
    "Groups with equally many slides or patients, by what is predicted; bars: 95 % intervals. Dotted: both are equal."
)

LEFT_OUT = "Squares: members that trained on all other sites. Dots: the chosen folds, same slides. 95 % intervals."

NULL = "Bars: the same study on permuted labels. Lines: the study itself; dashed: what chance gives."

FLOW = "Slides and patients from the table to training and scoring; at the right what was left out, and why."

VARIANTS = "Dots: held-out slides, with 95 % intervals over patients. Dashed: the study as it is."

SECTIONS: dict[str, Section] = {
    "flow": Section("Slides and patients", (Drawing("flow", "Where the slides went", FLOW, flow_figure),)),
    "encoder_seen": Section("What the encoder has seen"),
    "baselines": Section("Baselines on the same folds"),
    "calibration": Section(
        "Calibration",
        (
            Drawing(
                "reliability",
                "Reliability before and after",
                "Bins with equally many slides. Bars: 95 % Wilson interval of the fraction, patients as clusters.",
                reliability_figure,
            ),
        ),
    ),
    "task_calibration": Section(
        "Predicted against observed",
        (Drawing("task_calibration", "Predicted against observed", AGAINST, task_calibration_figure),),
    ),
    "operating_points": Section(
        "Operating points",
        (
            Drawing(
                "decision_curve",
                "Decision curve",
                "What acting on the model gains over acting on none, in true positives a slide, where a false alarm "
                "costs t / (1 - t) of what a true positive gains (Vickers and Elkin 2006). Of the calibrated "
                "probabilities where there are any; at the share of positives of these slides.",
                decision_figure,
            ),
        ),
    ),
    "conformal": Section(
        "Where the model says that it does not know",
        (
            Drawing(
                "answered",
                "Accuracy against the share answered",
                "Diamond: the coverage of this report, with 95 % intervals. Small dots: coverages from 0.5 to 0.99, of "
                "which three are written beside. Low ones leave slides without any class, which are not answered.",
                answered_figure,
            ),
        ),
    ),
    "conformal_intervals": Section("Where the model says that it does not know"),
    "confounding": Section(
        "Sites",
        (
            Drawing(
                "confounding",
                "The site, with and without its help",
                "Above: how well a linear model on mean tiles tells the site of held-out slides, features as they are "
                "and harmonised; dotted: chance. Below: what is reached for the label or target; bars are 95 % "
                "intervals over patients. Filled: this study.",
                confounding_figure,
            ),
        ),
    ),
    "left_out_sites": Section(
        "Sites left out",
        (Drawing("left_out_sites", "On sites that were left out", LEFT_OUT, left_out_figure),),
    ),
    "subgroups": Section(
        "Sub-groups",
        (
            Drawing("subgroups", "By sub-group, out-of-fold", FOREST, forest_figure("cross_validated")),
            Drawing("subgroups_test", "By sub-group, test split", FOREST, forest_figure("test")),
            Drawing("subgroups_new", "By sub-group", FOREST, forest_figure("new")),
        ),
    ),
    "covariates": Section(
        "Covariates",
        (Drawing("covariates", "With, without, alone", VARIANTS, variants_figure("covariates")),),
    ),
    "fusion": Section(
        "Encoders", (Drawing("fusion", "Alone, concatenated, fused", VARIANTS, variants_figure("fusion")),)
    ),
    "permutations": Section(
        "Permutation test", (Drawing("permutations", "The study on permuted labels", NULL, null_figure),)
    ),
}
"""Name of a block in metrics.json -> its section, in the order of the page; without the block there is no section."""


def warnings_in(blocks: dict[str, Any]) -> list[str]:
    """What blocks want to be known before reading: the sentences in their key `warnings`."""
    return [text for block in blocks.values() for text in block.get("warnings", [])]
