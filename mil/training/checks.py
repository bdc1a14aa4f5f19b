"""Before any training: do the table, the feature files and the labels fit together? All problems at once.

Axes: S slides, T tiles of one slide, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from extract.cohort import Cohort
from extract.config import ProblemsError
from extract.features.cache import CacheError, Header
from extract.features.folder import FeatureFolder
from extract.features.layouts.layout import SLIDE_EXTENSIONS
from extract.wording import count, name_some
from mil.study.roles import patients_in_both_splits
from mil.study.units import Unit, disagreements

FEW_TILES = 10
"""Bags below this are noted: a slide usually has hundreds of tiles, so its tissue may not have been found."""
SAME_MPP = 0.02
"""Relative difference up to which two microns per pixel are one (computed values differ in the last digits)."""
SHOWN_DIGITS = 12
"""Of a sha256 in a message."""
BLOCK_VALUES = 1 << 20
"""Values looked at in one go by `check_finite`: a few MB, so that a memory-mapped bag is never held as a whole."""
FILE_ENDINGS = (".h5", ".pt", ".npy", ".ome.tif", ".ome.tiff", ".jpeg", *SLIDE_EXTENSIONS)


class CheckError(ProblemsError):
    """The study cannot be trained as it is."""


@dataclass(frozen=True)
class Checked:
    """What is left to train on, and what the report has to tell.

    `cohort`: the slides that have usable features. `headers`: of these. `notes`: not wrong, but worth knowing.
    `dropped`: columns slide, reason; empty unless missing="drop".
    """

    cohort: Cohort
    headers: dict[str, Header]
    notes: list[str]
    dropped: pd.DataFrame


class HasFeatures(Protocol):
    """What `check_finite` needs of mil.bags.Bags."""

    def features(self, index: int) -> Any: ...


def check_features(
    cohort: Cohort,
    features: FeatureFolder,
    *,
    missing: Literal["error", "drop"],
    expected_dim: int | None = None,
    unit: Unit = "slide",
) -> Checked:
    """Compare the table with the feature files, without reading features.

    Args:
        missing: what to do with slides that have no usable features (no file, an unreadable one, no tiles): "error",
            or "drop" them and list them in `Checked.dropped`. All else that is wrong is an error either way.
        expected_dim: width the features must have, where something else fixes it.
        unit: what will be one bag; slides of a patient that is one must have one target and split.

    Raises:
        CheckError: all problems together, at most about 20 of a kind.
    """
    headers, reasons = read_headers(cohort.table["slide"], features)
    kept = cohort.subset(cohort.table["slide"].isin(list(headers)).to_numpy())
    problems = _width_problems(headers, expected_dim) + _mixture_problems(headers, features)
    if missing == "error":
        problems = _missing_problems(cohort, features, reasons) + problems + _label_problems(cohort, unit=unit)
    elif headers:
        problems += _label_problems(kept, len(reasons), unit)
    else:
        problems = ["no slide of the table has usable features", *_missing_problems(cohort, features, reasons)]
    if problems:
        raise CheckError("the study cannot be trained", problems)
    notes = _notes_on_files(cohort, features, headers) + notes_on_checksums(features, headers) + _notes_on_labels(kept)
    if reasons:
        notes.append(f"{count(len(reasons), 'slide')} dropped (checks.missing=drop): {name_some(reasons)}")
    dropped = pd.DataFrame(list(reasons.items()), columns=["slide", "reason"], dtype=object)
    return Checked(kept, headers, notes, dropped)


def check_finite(slides: Sequence[str], bags: HasFeatures) -> list[str]:
    """Slides that cannot be read, or have NaN or infinite features, as problems; reads all once, a block at a time.

    Args:
        slides: names, in the order of `bags`.
        bags: `bags.features(i)` gives (T, D), float16 or float32, an array or a CPU tensor.
    """
    problems = []
    for index, slide in enumerate(slides):
        try:
            bag_TD = np.asarray(bags.features(index))
        except CacheError as error:  # memory-mapped: this is the first use
            problems.append(f"slide {slide!r}: {error}")
            continue
        if not _all_finite(bag_TD):
            problems.append(_what_is_not_finite(slide, bag_TD))
    return problems


# --- table against files -------------------------------------------------------------------------------------------

NO_FILE = "no features"


def read_headers(slides: Iterable[str], features: FeatureFolder) -> tuple[dict[str, Header], dict[str, str]]:
    """The headers of usable feature files, and for every other slide the reason why it has none."""
    headers, reasons = {}, {}
    for slide in slides:
        if slide not in features.slides:
            reasons[slide] = NO_FILE
            continue
        try:
            header = features.header(slide)
        except CacheError as error:
            reasons[slide] = str(error)
            continue
        if header.n_tiles:
            headers[slide] = header
        else:
            why = header.provenance.empty_reason or "the file does not say why"
            reasons[slide] = f"{header.path}: no tiles ({why})"
    return headers, reasons


def _missing_problems(cohort: Cohort, features: FeatureFolder, reasons: dict[str, str]) -> list[str]:
    """Why slides have no usable features: first those without a file, then the files that are of no use."""
    absent = [slide for slide, reason in reasons.items() if reason == NO_FILE]
    problems = []
    if absent:
        unlisted = sorted(set(features.slides) - set(cohort.table["slide"]))
        near = near_names(absent, unlisted)
        problems.append(
            f"{len(absent)} of {count(len(cohort), 'slide')} have no features in {features.folder} (layout "
            f"{features.layout}): {name_some(absent)}. "
            + (f"Not in the table, but there: {name_some(unlisted)}. " if unlisted else "")
            + ("Make the names equal" if near else "Extract them, correct features.folder, or set checks.missing=drop")
        )
        problems += [f"slide {slide!r} seems to be there as {there!r}" for slide, there in near.items()]
    other = [f"slide {slide!r}: {reason}" for slide, reason in reasons.items() if reason != NO_FILE]
    return problems + [f"{line}; or set checks.missing=drop" for line in other]


def near_names(wanted: Sequence[str], there: Sequence[str]) -> dict[str, str]:
    """For names that are not there, the one that differs only in spelling; where several do, none.

    Spelling: upper and lower case, file endings, zero padding, `-`, `_` and blanks, or what follows the first dot
    (TCGA slides with and without their UUID).
    """
    whole = _unique_by(_plain_name, there)
    before_dot = _unique_by(lambda name: _plain_name(name.partition(".")[0]), there)
    found: dict[str, str] = {}
    for name in wanted:
        near = whole.get(_plain_name(name)) or before_dot.get(_plain_name(name.partition(".")[0]))
        if near and (_plain_name(near) == _plain_name(name) or "." not in name or "." not in near):
            found[name] = near
    return found


def _plain_name(name: str) -> str:
    plain = name.strip().lower()
    for ending in sorted(FILE_ENDINGS, key=len, reverse=True):
        plain = plain.removesuffix(ending)
    plain = re.sub(r"[-_ ]+", "_", plain)
    return re.sub(r"\d+", lambda digits: digits[0].lstrip("0") or "0", plain)


def _unique_by(spelling: Callable[[str], str], names: Sequence[str]) -> dict[str, str]:
    """Spelling -> name; "" where several names share a spelling."""
    by_spelling: dict[str, str] = {}
    for name in names:
        key = spelling(name)
        by_spelling[key] = "" if key in by_spelling else name
    return by_spelling


def _notes_on_files(cohort: Cohort, features: FeatureFolder, headers: dict[str, Header]) -> list[str]:
    notes = []
    listed = set(cohort.table["slide"])
    extra = [slide for slide in features.slides if slide not in listed]
    if extra:
        notes.append(
            f"{features.folder}: features of {count(len(extra), 'slide')} that the table does not list are not used: "
            f"{name_some(extra)}"
        )
    tiny = [f"{slide} ({header.n_tiles})" for slide, header in headers.items() if header.n_tiles < FEW_TILES]
    if tiny:
        notes.append(
            f"{count(len(tiny), 'slide')} with fewer than {FEW_TILES} tiles, in brackets how many: {name_some(tiny)}. "
            "Look whether their tissue was found"
        )
    return notes


def notes_on_checksums(features: FeatureFolder, headers: dict[str, Header]) -> list[str]:
    """One line if damage to features may go unnoticed."""
    if not features.verify:
        return ["features were not compared with their checksums (checks.verify=false)"]
    without = [slide for slide, header in headers.items() if not header.has_checksum]
    if not without:
        return []
    return [
        f"{len(without)} of {count(len(headers), 'feature file')} without a checksum (of another tool, or of an older "
        f"version), damage in which may go unnoticed: {name_some(without)}"
    ]


# --- files against each other --------------------------------------------------------------------------------------


def _width_problems(headers: dict[str, Header], expected_dim: int | None) -> list[str]:
    wrong = [h for h in headers.values() if expected_dim is not None and h.dim != expected_dim]
    if not wrong:
        return []
    made_by = f"; it was written by {wrong[0].provenance.encoder!r}" if wrong[0].provenance.encoder else ""
    return [
        f"{wrong[0].path}: features have {wrong[0].dim} columns, expected {expected_dim}{made_by}. "
        f"{count(len(wrong), 'file')} like this; extract them again or change features.folder"
    ]


def _mixture_problems(headers: dict[str, Header], features: FeatureFolder) -> list[str]:
    """What must be the same in all files of a study and is not. "" and 0 mean unknown and are not compared."""
    kinds: dict[str, Callable[[Header], Any]] = {
        "width": lambda h: h.dim,
        "encoder": lambda h: h.provenance.encoder,
        "encoder weights (sha256)": lambda h: h.provenance.weights_sha256[:SHOWN_DIGITS],
        "tile_px": lambda h: h.provenance.tile_px,
        "tile mpp": lambda h: h.provenance.mpp,
        "tiles.resample": lambda h: h.provenance.resample,
        "target magnification": lambda h: h.provenance.extra.get("target_magnification", 0),
    }
    if features.layout == "cache":  # elsewhere 0 may mean unknown
        kinds["overlap_px"] = lambda h: f"{h.provenance.overlap_px}"
    problems = []
    for kind, value_of in kinds.items():
        groups = _groups(headers.values(), value_of)
        if len(groups) > 1:
            listed = "; ".join(f"{value!r} in {count(len(g), 'file')}, such as {g[0]}" for value, g in groups)
            problems.append(
                f"features of more than one kind in {features.folder}: {kind} is {listed}. Extract those of the wrong "
                "kind again, or take their slides out of the table"
            )
    return problems


def _groups(headers: Iterable[Header], value_of: Callable[[Header], Any]) -> list[tuple[Any, list[Path]]]:
    """The files by value, the largest group first; unknown values left out, floats that hardly differ put together."""
    by_value: dict[Any, list[Path]] = {}
    for header in headers:
        value = value_of(header)
        if value in ("", 0):
            continue
        if isinstance(value, float):
            value = next((v for v in by_value if abs(value - v) <= SAME_MPP * v), value)
        by_value.setdefault(value, []).append(header.path)
    return sorted(by_value.items(), key=lambda group: -len(group[1]))


UNKNOWN = ("", 0, None)


def kind_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two `Provenance.same_kind` disagree: what, and both values, as they are shown. Unknown: not compared."""
    found = []
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if old in UNKNOWN or new in UNKNOWN or old == new:
            continue
        if key == "mpp" and math.isclose(old, new, rel_tol=SAME_MPP):
            continue
        short = [value[:SHOWN_DIGITS] if key == "weights_sha256" else value for value in (old, new)]
        found.append((key, short[0], short[1]))
    return sorted(found)


# --- labels and patients -------------------------------------------------------------------------------------------


def _label_problems(cohort: Cohort, n_dropped: int = 0, unit: Unit = "slide") -> list[str]:
    """Of a bag that is a patient, survival's own problems and those of splits say the same of its slides."""
    unlike = [p for p in disagreements(cohort) if "different splits" not in p] if unit == "patient" else []
    if cohort.target != "class":
        return _target_problems(cohort, n_dropped) + (unlike if cohort.target == "value" else [])
    return _class_problems(cohort, n_dropped) + unlike


def _class_problems(cohort: Cohort, n_dropped: int) -> list[str]:
    table, classes = cohort.table, cohort.classes
    after = f" once {count(n_dropped, 'slide')} without usable features are dropped" if n_dropped else ""
    both = patients_in_both_splits(cohort)
    problems = []
    if both:
        problems.append(
            f"{count(len(both), 'patient')} with slides in the train and in the test split: {name_some(both)}. "
            "Give all slides of a patient the same split"
        )
    train = table["label"][table["split"] == "train"]
    n_per_class = {name: int((train == name).sum()) for name in classes}
    if not any(n_per_class.values()):
        return [*problems, f"no slide of the train split has a label{after}"]
    for name in classes:
        if not (table["label"] == name).any():
            problems.append(f"class {name!r} is declared (classes) but no slide has it{after}: {_class_counts(cohort)}")
        elif not n_per_class[name]:
            problems.append(f"class {name!r} occurs in the test split only{after}, so it cannot be learned")
    if len(classes) < 2:
        problems.append(f"expected slides of at least two classes, got {_class_counts(cohort)}{after}")
    return problems


def _target_problems(cohort: Cohort, n_dropped: int) -> list[str]:
    """What makes numbers or times unfit to be learned."""
    after = f" once {count(n_dropped, 'slide')} without usable features are dropped" if n_dropped else ""
    both, problems = patients_in_both_splits(cohort), []
    if both:
        problems.append(
            f"{count(len(both), 'patient')} with slides in the train and in the test split: {name_some(both)}. "
            "Give all slides of a patient the same split"
        )
    return problems + target_problems(cohort, after)


def target_problems(cohort: Cohort, after: str = "") -> list[str]:
    """Numbers or times of the train split from which nothing can be learned."""
    table, problems = cohort.table, []
    train = table[(table["split"] == "train") & (cohort.labels_S >= 0)]
    if train.empty:
        return [f"no slide of the train split has {_what(cohort)}{after}"]
    if cohort.target == "survival":
        kinds = table[cohort.labels_S >= 0].groupby("patient")[["time", "event"]].nunique().max(axis=1)
        mixed = kinds.index[kinds > 1]
        if len(mixed):
            problems.append(
                f"{count(len(mixed), 'patient')} whose slides have different times or events: {name_some(mixed)}. A "
                "patient has one; a table with a row an event needs the first, or the last, of each"
            )
        if not (train["event"] == 1).any():
            problems.append(f"no patient of the train split has an event{after}, so there is nothing to learn")
    elif train["value"].nunique() < 2:
        problems.append(f"the target is {train['value'].iloc[0]:g} for every slide of the train split{after}")
    return problems


def _what(cohort: Cohort) -> str:
    return "a time and an event" if cohort.target == "survival" else "a value"


def _class_counts(cohort: Cohort) -> str:
    return ", ".join(f"{name!r} {(cohort.table['label'] == name).sum()}" for name in cohort.classes)


def _notes_on_labels(cohort: Cohort) -> list[str]:
    table, notes = cohort.table, []
    unlabelled = table[cohort.labels_S < 0]
    for split, what in (("train", "not used"), ("test", "predicted, not scored")):
        slides = unlabelled["slide"][unlabelled["split"] == split]
        if len(slides):
            lacking = "a label" if cohort.target == "class" else _what(cohort)
            unnamed = f"{count(len(slides), 'slide')} of the {split} split without {lacking}"
            notes.append(f"{unnamed}, {what}: {name_some(slides)}")
    n_labels = table[cohort.labels_S >= 0].groupby("patient")["label"].nunique()
    mixed = n_labels.index[n_labels > 1]
    plural = "labels" if cohort.target == "class" else "values"
    if len(mixed):
        notes.append(
            f"{count(len(mixed), 'patient')} with slides of different {plural}, which stay together in one fold: "
            f"{name_some(mixed)}"
        )
    return notes


# --- values --------------------------------------------------------------------------------------------------------

EXPONENT = {"float16": (np.uint16, 0x7FFF, 0x7C00), "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000)}
"""IEEE 754: as integers of that type, without the sign bit, values that are not finite are the ones from here on."""


def _all_finite(bag_TD: np.ndarray) -> bool:
    """Compares bits: for float16 ten times as fast as numpy.isfinite, and unlike a sum it cannot overflow."""
    integer, without_sign, not_finite = EXPONENT[bag_TD.dtype.name]
    bits_TD = bag_TD.view(integer)
    return all((block & integer(without_sign)).max(initial=0) < not_finite for _, block in _blocks(bits_TD))


def _blocks(bag_TD: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Runs of tiles of about BLOCK_VALUES values, each with the index of its first tile."""
    step = max(1, BLOCK_VALUES // max(1, bag_TD.shape[1]))
    for start in range(0, len(bag_TD), step):
        yield start, bag_TD[start : start + step]


def _what_is_not_finite(slide: str, bag_TD: np.ndarray) -> str:
    n_nan = n_inf = 0
    bad: list[int] = []
    for start, block_TD in _blocks(bag_TD):
        n_nan += int(np.isnan(block_TD).sum())
        n_inf += int(np.isinf(block_TD).sum())
        bad += (start + np.flatnonzero(~np.isfinite(block_TD).all(axis=1))).tolist()
    return (
        f"slide {slide!r}: {n_nan} NaN and {n_inf} infinite values in {len(bad)} of {count(len(bag_TD), 'tile')}, "
        f"the first is tile {bad[0]}. Extract it again" + (" with features.dtype=float32" if n_inf else "")
    )
