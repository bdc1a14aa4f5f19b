"""The null distribution of a permutation test, and where the study is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from extract.wording import p_value
from mil.report.figures import BLUE, INK, MUTED, VERMILLION, new_figure
from mil.report.wording import CORRELATIONS, main_metric, short_name

SETS = {"cross_validated": ("out-of-fold", BLUE), "test": ("test ensemble", VERMILLION)}


def null_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """A histogram for each set of slides; the line is the study."""
    sets = {name: s for name, s in metrics["permutations"]["sets"].items() if s["observed"] is not None}
    if not sets:
        return None
    figure, axes = new_figure(3.6)
    values = [v for s in sets.values() for v in [*s["null"], s["observed"]] if v is not None]
    low, high = min(values), max(values)
    bins = np.linspace(low, high if high > low else low + 0.01, 32)
    for name, found in sets.items():
        text, colour = SETS[name]
        axes.hist([v for v in found["null"] if v is not None], bins=bins.tolist(), color=colour, alpha=0.35)
        label = f"{text}: {found['observed']:.3f}, p {p_value(found['p_value'], said=True)}"
        axes.axvline(found["observed"], color=colour, lw=2, label=label)
    axes.set(xlabel=short_name(metrics), ylabel="permutations")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axvline(0.0 if main_metric(metrics) in CORRELATIONS else 0.5, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    figure.legend(loc="outside upper left", frameon=False, fontsize=8.5, labelcolor=INK)
    return figure
