"""Slides that are left out because somebody looked at them and said so (`reviews=FILE`, which mil.view writes)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pandas as pd

from extract.cohort import Cohort
from extract.config import ConfigError
from extract.wording import count, name_some
from mil.config import Reviews
from mil.study.reviews import left_out
from mil.training.checks import Checked


def reasons_of(section: Reviews) -> dict[str, str]:
    """Slide -> why it is left out; TableError for a file that is not there or cannot be read."""
    return {} if section.file is None else left_out(section.file, section.leave_out)


def without_reviewed(cohort: Cohort, section: Reviews) -> Cohort:
    """The cohort without the slides that are left out.

    Raises:
        ConfigError: none is left.
    """
    reasons = reasons_of(section)
    kept_S = ~cohort.table["slide"].isin(list(reasons)).to_numpy()
    if not kept_S.any():
        raise ConfigError("no slides", [f"reviews={section.file}: every slide of the cohort is left out"])
    return cohort.subset(kept_S) if reasons else cohort


def with_reviewed(checked: Checked, cohort: Cohort, section: Reviews) -> Checked:
    """What was checked, with the slides of `cohort` that are left out among those that were dropped, and a note."""
    reasons = reasons_of(section)
    gone = {slide: reasons[slide] for slide in cohort.table["slide"] if slide in reasons}
    if section.file is None:
        return checked
    marks = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(gone.values()).items()))
    names = f" ({marks}): {name_some(gone)}" if gone else ""
    notes = [f"{count(len(gone), 'slide')} left out for {section.file.name}{names}"]
    if len(gone) < len(reasons):
        notes.append(f"{count(len(reasons) - len(gone), 'slide')} of {section.file.name} not in the cohort")
    dropped = pd.concat([checked.dropped, pd.DataFrame(list(gone.items()), columns=["slide", "reason"], dtype=object)])
    return replace(checked, dropped=dropped.reset_index(drop=True), notes=[*checked.notes, *notes])
