"""The block `left_out_sites` of metrics.json: members that trained on all other sites, beside the chosen folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mil.report.comparison import Run, differences
from mil.report.ladder import plain
from mil.results.summary import evaluate
from mil.results.tables import held_out, member_thresholds, pooled_out_of_fold

METHOD = (
    "one member a site and seed, trained on the slides of all other sites in the same pass; the chosen folds: "
    "out-of-fold, the same slides. The difference (left out - chosen folds) is paired, patients as clusters"
)


def left_out_block(
    left_out: pd.DataFrame,
    chosen: pd.DataFrame,
    site_of_member: Mapping[int, str],
    classes: Sequence[str],
    *,
    not_left_out: Mapping[str, str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """AUC of every site with its interval, of all together, and of the chosen folds on the same slides.

    Args:
        left_out, chosen: rows as predictions.csv has them, of these members and of the study's own.
        not_left_out: site -> why no member leaves it out.
    """
    left_out = left_out[left_out["role"] == "test"]
    chosen = chosen[held_out(chosen) & chosen["slide"].isin(left_out["slide"])]
    site_of = dict(zip(left_out["slide"], left_out["member"].map(site_of_member), strict=True))
    tables = {
        name: pooled_out_of_fold(rows, classes, member_thresholds(rows, classes))
        for name, rows in (("left_out", left_out), ("chosen_folds", chosen))
    }

    def of(slides: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, table in tables.items():
            scored = evaluate(table[table["slide"].isin(slides)], classes, resamples, seed)
            found |= {"counts": scored["counts"]} if name == "left_out" else {}
            found[name] = scored["metrics"]["auc"]
        return found

    runs = [Run(name, Path(), rows, {"classes": classes}) for name, rows in (("a", left_out), ("b", chosen))]
    rows = differences(runs, intervals=resamples > 0).to_dict("records") if len(chosen) else []
    names = sorted(set(site_of.values()))
    return {
        "sites": [{"site": name, **of([s for s, own in site_of.items() if own == name])} for name in names],
        "all": of(list(site_of)),
        "difference": plain(rows[0]) if rows else None,
        "members": len(site_of_member),
        "not_left_out": [{"site": site, "why": why} for site, why in not_left_out.items()],
        "method": METHOD,
    }
