"""How well the tile scores of a finished run find lesions that a pathologist outlined.

Axes: N tiles, L lesions, F false positives, K tiles outside the lesions, 2 = (x, y).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from extract.config import ProblemsError, did_you_mean
from extract.features.cache import CacheError
from extract.outlines.shapes import SUFFIXES
from extract.slides.errors import SlideError
from extract.tables import write_csv
from extract.whole import write_whole
from mil.look.froc import apart, collected, froc
from mil.look.lesion_config import LesionConfig
from mil.look.outlines import (
    CAMELYON16_ITC_UM,
    Outlines,
    isolated_cells,
    read_outlines,
    refuse_outlines_off,
    separate_lesions,
    tile_truth,
)
from mil.look.scenes import Scene, Theatre, open_theatre
from mil.results.tables import OUT_OF_FOLD, TEST_ENSEMBLE
from mil.results.trained import open_run
from mil.tasks.estimates import LEVEL

TOP = (10, 50)
"""The share of so many top tiles that lies inside is stated."""
SETTINGS = {
    *("run", "which", "score", "target", "member", "negative", "exclusion_groups"),
    *("inside", "itc_um", "merge_um", "apart_um"),
}
"""What of the config lesions.json repeats."""

# --- the slides ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What the scores of one slide find.

    row: of lesions.csv. lesions_L: highest score of the tiles that touch each lesion that counts, -inf for none.
    false_F: scores of the false positives, None on a slide where they cannot be known.
    """

    row: dict[str, Any]
    patient: str
    lesions_L: np.ndarray
    false_F: np.ndarray | None


def check_lesions(config: LesionConfig) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row a slide, and the summary.

    Raises:
        ProblemsError: run, features or outlines cannot be used; problems of all slides together.
    """
    assert config.run is not None
    assert config.annotations is not None
    theatre = open_theatre(
        open_run(config.run, device=config.device),
        features=config.features.folders,
        layout=config.features.layout,
        slides=config.slides,
    )
    files = outline_files(config.annotations)
    wanted, passed_over = slides_to_check(config, theatre, files)
    found, problems = [], []
    for slide in wanted:
        try:
            found.append(check_slide(config, theatre, slide, files.get(slide)))
        except (ProblemsError, CacheError, SlideError) as error:
            problems += error.problems if isinstance(error, ProblemsError) else [str(error)]
    if problems:
        raise ProblemsError("lesions cannot be checked", problems)
    return pd.DataFrame([one.row for one in found]), summarise(config, found, passed_over)


def outline_files(annotations: Path) -> dict[str, Path]:
    """Slide id -> file of outlines."""
    if annotations.is_file():
        return {annotations.stem: annotations}
    if not annotations.is_dir():
        raise ProblemsError("no outlines", [f"annotations={annotations}: no such folder"])
    paths = sorted(path for path in annotations.iterdir() if path.suffix.lower() in SUFFIXES)
    stems = [path.stem for path in paths]
    doubles = sorted({str(path) for path in paths if stems.count(path.stem) > 1})
    if doubles:
        raise ProblemsError("no outlines", [f"{', '.join(doubles)}: several files for one slide; keep one"])
    if not paths:
        raise ProblemsError("no outlines", [f"annotations={annotations}: no file ends in {', '.join(SUFFIXES)}"])
    return dict(zip(stems, paths, strict=True))


def slides_to_check(
    config: LesionConfig, theatre: Theatre, files: dict[str, Path]
) -> tuple[list[str], dict[str, list[str]]]:
    """Slides with outlines, slides that have no lesion by their label; and by reason those that are passed over."""
    table = theatre.verdicts.slides
    negative, problems = wanted_classes(config, theatre)
    problems += [
        f"not_exhaustive: no slide {slide!r} in the study{did_you_mean(slide, list(table.index))}"
        for slide in config.not_exhaustive
        if slide not in table.index
    ]
    kinds = set(table["kind"])
    kind = {"test": TEST_ENSEMBLE, "cross-validated": OUT_OF_FOLD}.get(config.which)
    kind = kind or (TEST_ENSEMBLE if TEST_ENSEMBLE in kinds else OUT_OF_FOLD)
    chosen = table[table["kind"] == kind].sort_index()
    outlined = [slide for slide in chosen.index if slide in files]
    if not outlined:
        first = next(iter(files))
        hint = did_you_mean(first, list(chosen.index)) or f"; a file must be called like its slide, such as {first}"
        problems.append(f"annotations={config.annotations}: no outlines of the {len(chosen)} slides ({kind}){hint}")
    if problems:
        raise ProblemsError("lesions cannot be checked", problems)
    clean = [slide for slide in chosen.index if slide not in files and chosen.loc[slide, "label"] in negative]
    rest = sorted(set(chosen.index) - set(outlined) - set(clean))
    other = sorted(set(files) - set(outlined))
    return sorted(outlined + clean), {"no outlines": rest, "outlines of other slides": other}


def wanted_classes(config: LesionConfig, theatre: Theatre) -> tuple[list[str], list[str]]:
    """Labels that say that a slide has no lesion, and what is wrong with the classes that were asked for.

    Of a task other than classification no label says so by itself: grades may be named, values and times cannot.
    """
    task = theatre.trained.task
    classes = list(task.classes) if task.name in ("classification", "ordinal") else []
    if theatre.trained.of_classes:
        target = config.target or classes[-1]
        wanted = [target]
        negative = [name for name in classes if name != target] if config.negative is None else config.negative
    else:
        wanted, negative = [config.target] if config.target else [], config.negative or []
    known = {"target": classes if theatre.trained.of_classes else list(task.thresholds()), "negative": classes}
    problems = [
        f"{key}={name}: expected one of {', '.join(known[key])}{did_you_mean(name, known[key])}"
        if known[key]
        else f"{key}={name}: task={task.name} has no classes; leave it out"
        for key, names in (("target", wanted), ("negative", negative))
        for name in names
        if name not in known[key]
    ]
    return negative, problems


def check_slide(config: LesionConfig, theatre: Theatre, slide: str, file: Path | None) -> Found:
    """One slide against its outlines; `file` None: a slide without lesions."""
    outlines = read_outlines(file, config.exclusion_groups) if file else Outlines(Path(slide), (), ())
    target = config.target or (theatre.trained.classes[-1] if theatre.trained.of_classes else None)
    with theatre.scene(slide, kind=config.score, scale="raw", member=config.member, target=target) as scene:
        places = scene.places
        if places.frame != "level-0" or places.mpp is None:
            what = "level-0 coordinates" if places.frame != "level-0" else "microns per pixel"
            raise ProblemsError("", [f"slide {slide!r}: {what} unknown; set slides.folder to the slide files"])
        size = None if scene.slide is None else (scene.slide.width, scene.slide.height)
        if file:
            refuse_outlines_off(outlines, places.coords_N2, places.tile_side, size)
    lesions = separate_lesions(outlines, config.merge_um / places.mpp)
    truth = tile_truth(places.coords_N2, places.tile_side, lesions)
    inside_N, touched_N = truth.inside_N(config.inside), truth.covered_N > 0
    exhaustive = slide not in config.not_exhaustive
    isolated_L = isolated_cells(lesions, limit_of(config, outlines), places.mpp)
    best_L = truth.best_score_L(scene.scores_N)[~isolated_L]
    false_F = None
    if exhaustive:
        outside = np.flatnonzero(~touched_N)
        centres_K2 = places.coords_N2[outside] + places.tile_side / 2
        kept = apart(centres_K2, scene.scores_N[outside], config.apart_um / places.mpp)
        false_F = scene.scores_N[outside][kept]
    row = {
        "slide": slide,
        "label": scene.scores.verdict.label,
        "exhaustive": exhaustive,
        "lesions": len(lesions),
        "isolated_cells": int(isolated_L.sum()),
        "lesions_without_tile": int(np.isinf(best_L).sum()),
        "lesion_mm2": sum(lesion.area for lesion in lesions) * (places.mpp / 1000) ** 2,
        "exclusions": len(outlines.exclusions),
        "skipped_outlines": len(outlines.skipped),
        "tiles": truth.n_tiles,
        "tiles_inside": int(inside_N.sum()),
        "tiles_border": int((touched_N & ~inside_N).sum()),
        **tile_figures(scene, inside_N, touched_N, exhaustive),
    }
    return Found(row, str(theatre.verdicts.slides.loc[slide, "patient"]), best_L, false_F)


def limit_of(config: LesionConfig, outlines: Outlines) -> float:
    """Microns below which a lesion of this slide is isolated tumour cells."""
    if config.itc_um is not None:
        return config.itc_um
    return CAMELYON16_ITC_UM if outlines.camelyon16 else 0.0


def tile_figures(
    scene: Scene, inside_N: np.ndarray, touched_N: np.ndarray, exhaustive: bool
) -> dict[str, float | None]:
    """Tile AUC (inside against untouched; the border is left out) and the share of the top tiles that is inside.

    None where undefined: no tile inside, none outside, or lesions that nobody outlined.
    """
    figures: dict[str, float | None] = {"tile_auc": None}
    known = inside_N | ~touched_N
    usable = exhaustive and bool(inside_N.any())
    if usable and not inside_N[known].all():
        figures["tile_auc"] = float(roc_auc_score(inside_N[known], scene.scores_N[known]))
    for k in TOP:
        first = scene.order_N[:k]
        figures[f"top{k}_inside"] = float(inside_N[first].mean()) if usable else None
        figures[f"top{k}_possible"] = min(int(inside_N.sum()), len(first)) / len(first) if usable else None
    return figures


# --- the summary -----------------------------------------------------------------------------------------------------


def summarise(config: LesionConfig, found: Sequence[Found], passed_over: dict[str, list[str]]) -> dict[str, Any]:
    """What lesions.json holds: plain numbers, None where undefined."""
    finds = collected([(one.lesions_L, one.false_F) for one in found])
    patients = [one.patient for one in found]
    allowed, draws = config.false_positives, {"resamples": config.bootstrap, "seed": config.seed}
    curve, (mean_low, mean_high) = froc(finds, allowed, patients, **draws)
    known = [row["sensitivity"] for row in curve if row["sensitivity"] is not None]
    names = ["tile_auc", *(f"top{k}_{what}" for k in TOP for what in ("inside", "possible"))]
    return {
        "slides": len(found),
        "slides_with_lesions": sum(one.row["lesions"] > 0 for one in found),
        "slides_counting_false_positives": int(finds.counting_S.sum()),
        "lesions": sum(one.row["lesions"] for one in found),
        "isolated_cells": sum(one.row["isolated_cells"] for one in found),
        "lesions_counted": len(finds.lesions_L),
        "lesions_without_tile": int(np.isinf(finds.lesions_L).sum()),
        "per_slide": {name: mean_and_quartiles([one.row[name] for one in found]) for name in names},
        "froc": curve,
        "froc_mean_sensitivity": float(np.mean(known)) if known else None,
        "froc_mean_low": mean_low,
        "froc_mean_high": mean_high,
        "bootstrap": {**draws, "unit": "patient", "level": LEVEL},
        "passed_over": passed_over,
        "not_exhaustive": config.not_exhaustive,
        "settings": config.model_dump(mode="json", include=SETTINGS),
    }


def mean_and_quartiles(values: Sequence[float | None]) -> dict[str, Any]:
    """Over the slides for which it is defined."""
    known = [value for value in values if value is not None]
    if not known:
        return {"n": 0, "mean": None, "quartiles": None}
    return {"n": len(known), "mean": float(np.mean(known)), "quartiles": np.quantile(known, [0.25, 0.5, 0.75]).tolist()}


def summary_text(summary: dict[str, Any]) -> str:
    """A few aligned lines for the terminal."""
    lines = [
        f"{summary['slides']} slides, {summary['slides_with_lesions']} with {summary['lesions']} lesions"
        + (f" ({summary['lesions_without_tile']} on no tile)" if summary["lesions_without_tile"] else "")
    ]
    if summary["isolated_cells"]:
        lines.append(
            f"  {summary['isolated_cells']} of them isolated tumour cells, which sensitivity leaves out "
            "(itc_um=0 counts them)"
        )
    auc = summary["per_slide"]["tile_auc"]
    if auc["n"]:
        low, middle, high = auc["quartiles"]
        lines.append(
            f"  tile AUC, mean of {auc['n']} slides  {auc['mean']:.3f}  (quartiles {low:.3f} {middle:.3f} {high:.3f})"
        )
    for k in TOP:
        inside, possible = summary["per_slide"][f"top{k}_inside"], summary["per_slide"][f"top{k}_possible"]
        if inside["n"]:
            lines.append(f"  top {k} tiles inside  {inside['mean']:.3f}  (possible: {possible['mean']:.3f})")
    lines += froc_lines(summary)
    for reason, slides in summary["passed_over"].items():
        if slides:
            shown = ", ".join(slides[:6]) + (", ..." if len(slides) > 6 else "")
            lines.append(f"  passed over, {reason}: {len(slides)} ({shown})")
    return "\n".join(lines)


def froc_lines(summary: dict[str, Any]) -> list[str]:
    """The sensitivities, a line each, with their intervals over patients."""

    def text(value: float | None, low: float | None, high: float | None) -> str:
        if value is None:
            return "undefined"
        return f"{value:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")

    lines = [
        "  sensitivity for lesions [95 % interval over patients] at false positives a slide "
        f"({summary['slides_counting_false_positives']} slides count them)"
    ]
    for row in summary["froc"]:
        value = text(row["sensitivity"], row["low"], row["high"])
        found = f"{row['found']} of {summary['lesions_counted']}"
        lines.append(f"    {row['false_positives_per_slide']:>5g}  {value}  {found}")
    if summary["froc_mean_sensitivity"] is not None:
        mean = text(summary["froc_mean_sensitivity"], summary["froc_mean_low"], summary["froc_mean_high"])
        lines.append(f"    mean   {mean}")
    return lines


def write_lesions(folder: Path, table: pd.DataFrame, summary: dict[str, Any]) -> list[Path]:
    """lesions.csv and lesions.json; their paths."""
    csv, json_file = folder / "lesions.csv", folder / "lesions.json"
    write_csv(table, csv)
    write_whole(json_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return [csv, json_file]
