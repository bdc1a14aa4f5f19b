"""What a report on new slides says beside its metrics: those blocks of a study (`mil.pipeline.blocks`) that hold here.

Not here: `permutations` and `learning_curve`, which train; the linear models of `confounding` for the label and on
sites left out, which would be fitted on these very slides. Calibration, operating points and conformal sets are applied
as the study fitted them (`mil.prediction.decisions`).

Axes: M members, S slides, R rounds of the study, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from extract.cohort import Cohort, site_of_barcode
from mil.prediction.decisions import blocks_on
from mil.prediction.job import Job, Scored
from mil.report.ladder import as_logits, ladder_block
from mil.results.confounding import confounding_of_new
from mil.results.flow import flow_of_new, seen_before
from mil.results.site_models import Slides
from mil.results.subgroups import subgroups_block
from mil.results.tables import held_out_ensemble, predictions_table
from mil.results.task_summary import ensemble
from mil.study.sites import site_names, site_rows
from mil.study.subgroups import named_groups
from mil.study.units import bag_of_slides
from mil.training.ladder_saved import Ladder


@dataclass(frozen=True)
class Predicted:
    """Slides that a trained study has scored. cohort: also those that failed. members: members.csv.

    asked: the table of slides, of which those of a patient may be one row of `cohort`.
    """

    job: Job
    cohort: Cohort
    scored: Scored
    members: pd.DataFrame
    asked: Cohort

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The scored slides in their order, as the cohort's table has them."""
        return self.cohort.table.set_index("slide", drop=False).loc[self.scored.slides].reset_index(drop=True)

    @cached_property
    def held_out(self) -> pd.DataFrame:
        """The slides that metrics count; column `row`: the place among `scored`."""
        if not self.job.trained.of_classes:
            task, rows = self.job.trained.task, self.members[self.members["role"] == "test"]
            known = task.labelled(ensemble(task, rows)) if len(rows) else rows
            return known.assign(row=pd.Index(self.scored.slides).get_indexer(pd.Index(known["slide"])))
        table = held_out_ensemble(self.members, self.job.trained.classes, self.job.trained.thresholds)
        return table.assign(row=pd.Index(self.scored.slides).get_indexer(pd.Index(table["slide"])))

    @property
    def resamples(self) -> int:
        return self.job.config.report.bootstrap


def flow(done: Predicted) -> dict[str, Any]:
    """From the table of new slides to those that are predicted and counted."""
    failed = [(f.slide, f.reason) for f in done.job.failed if f.slide not in set(done.scored.slides)]
    gone = pd.DataFrame(failed, columns=["slide", "reason"]).drop_duplicates("slide")
    gone = gone.merge(done.asked.table[["slide", "patient"]], on="slide")
    predicted = done.asked.table["slide"][~done.asked.table["slide"].isin(gone["slide"])]
    counted_S = predicted.map(bag_of_slides(done.cohort.table)).isin(done.held_out["slide"]).to_numpy()
    return flow_of_new(done.asked, gone, counted_S, done.scored.n_tiles, done.job.trained.n_members)


def encoder_seen(done: Predicted) -> dict[str, Any]:
    return seen_before(done.asked.table, str(done.job.trained.environment["features"].get("encoder") or ""))


def baselines(done: Predicted) -> dict[str, Any] | None:
    """The study's baselines asked about the same slides; None where it kept none, or `report.baselines=false`."""
    trained, ladder = done.job.trained, done.job.trained.ladder
    if not isinstance(ladder, Ladder) or done.scored.of_tiles_SRC is None or not done.job.config.report.baselines:
        return None
    p_of = ladder.of_means(done.scored.means_SD) | {"tile_logistic": done.scored.of_tiles_SRC.swapaxes(0, 1)}
    counted = done.rows["slide"].isin(done.held_out["slide"])
    roles_MS = np.tile(np.where(counted, "test", "train"), (trained.n_members, 1))
    tables = {
        name: predictions_table(trained.plan, done.rows, roles_MS, as_logits(p_RSC)[ladder.round_M])
        for name, p_RSC in p_of.items()
    }
    return ladder_block(
        trained.description.aggregator,
        trained.classes,
        done.members[done.members["role"] == "test"],
        {name: table[table["role"] == "test"] for name, table in tables.items()},
        resamples=done.resamples,
        seed=trained.config.seed,
        tiles_per_slide=ladder.tiles_per_slide,
    ) | {"new": True}


def confounding(done: Predicted) -> dict[str, Any] | None:
    """None with fewer than two sites among the slides that count, or `report.confounding=false`."""
    trained = done.job.trained
    labels = {name: c for c, name in enumerate(trained.classes)}
    slides = slides_of(done, np.array([labels.get(label, -1) for label in done.rows["label"]], dtype=np.int64))
    there = slides.site_S[done.held_out["row"]]
    if done.job.config.report.confounding is False or len(np.unique(there[there > 0])) < 2:
        return None
    fixed = (slides, done.held_out, trained.classes)
    seed, harmonize = trained.config.seed, trained.config.train.harmonize
    return confounding_of_new(*fixed, harmonize=harmonize, resamples=done.resamples, seed=seed)


def slides_of(done: Predicted, label_S: np.ndarray) -> Slides:
    """What linear models on the sites see. label_S: -1 without one."""
    table = done.rows
    said = table["site"] if "site" in table else pd.Series([""] * len(table))
    site_of = [site or site_of_barcode(slide) for site, slide in zip(said, table["slide"], strict=True)]
    names = site_names(site_of)
    return Slides(done.scored.means_SD, site_rows(site_of, names), label_S, table["patient"].to_numpy(str), names)


def subgroups(done: Predicted) -> dict[str, Any] | None:
    """Of the groupings asked for, else the study's, where the table has their columns."""
    further = done.cohort.further
    if further is None or not done.job.groupings:
        return None
    groups = named_groups(done.job.groupings, done.cohort.table["slide"].tolist(), further)
    fixed = (done.job.trained.classes, done.resamples, done.job.trained.config.seed)
    return subgroups_block(groups, {"new": done.held_out}, *fixed)


BLOCKS: dict[str, Callable[[Predicted], dict[str, Any] | None]] = {
    "flow": flow,
    "encoder_seen": encoder_seen,
    "baselines": baselines,
    "confounding": confounding,
    "subgroups": subgroups,
}
"""As `mil.pipeline.blocks.BLOCKS` has them."""


def blocks_of(done: Predicted) -> dict[str, Any]:
    """The blocks that have something to say; of no slide that counts only where the slides went."""
    wanted = BLOCKS if len(done.held_out) else {"flow": flow, "encoder_seen": encoder_seen}
    made = {name: make(done) for name, make in wanted.items()}
    return {name: block for name, block in made.items() if block is not None} | blocks_on(done.job, done.members)
