"""python -m mil.lesions run=RUN annotations=FOLDER [key=value ...]

How well tile scores find lesions that a pathologist outlined: tile AUC, the share of the top tiles inside, and the
sensitivity for lesions at stated numbers of false positives a slide (FROC). FOLDER holds SLIDE.xml (ASAP, as in
Camelyon16) or SLIDE.geojson. Writes lesions.csv (one row a slide) and lesions.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from extract.config import Device, Features, ProblemsError, Section, Slides, config_from_command_line, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from mil.look.scenes import Scene, Theatre

TOP = (10, 50)


class LesionConfig(Section):
    """Everything `python -m mil.lesions` can be told."""

    run: Path | None = Field(None, description="run folder of mil.train")
    annotations: Path | None = Field(None, description="folder with one file of outlines a slide, or one such file")
    out: Path = Field(Path("lesions"), description="folder for lesions.csv and lesions.json")
    which: Literal["held-out", "test", "cross-validated"] = Field(
        "held-out", description="slides to look at; held-out: the test split if there is one, else cross-validated"
    )
    score: Literal["attention", "evidence"] = Field("evidence", description="see mil.heatmap; raw, not percentiles")
    target: str | None = Field(None, description="class that the lesions are of; default: the positive class")
    member: int | None = Field(None, ge=0, description="this member alone; default: all that held the slide out")
    negative: list[str] | None = Field(None, description="classes without lesions; default: all but the target")
    exclusion_groups: list[str] = Field(["Exclusion", "_2"], description="outlines that are cut out of the lesions")
    not_exhaustive: list[str] = Field(
        [], description="slides with lesions that nobody outlined: only sensitivity is counted there"
    )
    inside: float = Field(0.5, gt=0, le=1, description="least share of a tile that is lesion, to be inside")
    merge_um: float = Field(75.0, ge=0, description="outlines nearer than this are one lesion (75 in Camelyon16)")
    apart_um: float = Field(200.0, ge=0, description="false positives nearer than this to a higher one count once")
    false_positives: list[float] = Field(
        [0.25, 0.5, 1, 2, 4, 8], min_length=1, description="mean number a slide at which sensitivity is stated"
    )
    features: Features = Features()
    slides: Slides = Slides()
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, mps")


def lesion_problems(tree: dict[str, Any]) -> list[str]:
    problems = [] if tree.get("run") else ["run: no run folder given; set run=runs/NAME"]
    if not tree.get("annotations"):
        problems.append("annotations: none given; set annotations=FOLDER with SLIDE.xml or SLIDE.geojson")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 something is wrong (nothing written)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(LesionConfig, arguments, __doc__ or "", also=lesion_problems)
    from extract.features.cache import (  # these import torch: only now that the config is valid
        CacheError,
        replace_on_success,
    )
    from extract.slides.errors import SlideError

    try:
        table, summary = check_lesions(config)
    except (ProblemsError, CacheError, SlideError) as error:
        print(error, file=sys.stderr)
        return 2
    with replace_on_success(config.out / "lesions.csv") as temporary:
        table.to_csv(temporary, index=False)
    with replace_on_success(config.out / "lesions.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(summary_text(summary))
    print(f"\n{config.out / 'lesions.csv'}\n{config.out / 'lesions.json'}")
    return 0


# --- the slides ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What the scores of one slide find.

    row: of lesions.csv. lesions_L: highest score of the tiles that touch each lesion, -inf for none.
    false_F: scores of the false positives, None on a slide where they cannot be known.
    """

    row: dict[str, Any]
    lesions_L: np.ndarray
    false_F: np.ndarray | None


def check_lesions(config: LesionConfig) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row a slide, and the summary.

    Raises:
        ProblemsError: run, features or outlines cannot be used; problems of all slides together.
    """
    import pandas as pd

    from extract.features.cache import CacheError
    from extract.slides.errors import SlideError
    from mil.look.scenes import open_theatre
    from mil.results.trained import open_run

    assert config.run is not None
    assert config.annotations is not None
    theatre = open_theatre(
        open_run(config.run, device=config.device),
        features=config.features.folder,
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
    from mil.look.outlines import SUFFIXES

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
    from mil.results.tables import OUT_OF_FOLD, TEST_ENSEMBLE

    table, classes = theatre.verdicts.slides, list(theatre.trained.classes)
    target = config.target or classes[-1]
    negative = [name for name in classes if name != target] if config.negative is None else config.negative
    problems = [
        f"{key}={name}: expected one of {', '.join(classes)}{did_you_mean(name, classes)}"
        for key, names in (("target", [target]), ("negative", negative))
        for name in names
        if name not in classes
    ]
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


def check_slide(config: LesionConfig, theatre: Theatre, slide: str, file: Path | None) -> Found:
    """One slide against its outlines; `file` None: a slide without lesions."""
    import numpy as np

    from mil.look.outlines import Outlines, read_outlines, refuse_outlines_off, separate_lesions, tile_truth

    outlines = read_outlines(file, config.exclusion_groups) if file else Outlines(Path(slide), (), ())
    target = config.target or theatre.trained.classes[-1]
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
    best_L = truth.best_score_L(scene.scores_N)
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
        "lesions_without_tile": int(np.isinf(best_L).sum()),
        "lesion_mm2": sum(lesion.area for lesion in lesions) * (places.mpp / 1000) ** 2,
        "exclusions": len(outlines.exclusions),
        "skipped_outlines": len(outlines.skipped),
        "tiles": truth.n_tiles,
        "tiles_inside": int(inside_N.sum()),
        "tiles_border": int((touched_N & ~inside_N).sum()),
        **tile_figures(scene, inside_N, touched_N, exhaustive),
    }
    return Found(row, best_L, false_F)


def tile_figures(
    scene: Scene, inside_N: np.ndarray, touched_N: np.ndarray, exhaustive: bool
) -> dict[str, float | None]:
    """Tile AUC (inside against untouched; the border is left out) and the share of the top tiles that is inside.

    None where undefined: no tile inside, none outside, or lesions that nobody outlined.
    """
    from sklearn.metrics import roc_auc_score

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


def apart(centres_K2: np.ndarray, scores_K: np.ndarray, distance: float) -> np.ndarray:
    """Rows that remain when, from the highest score down, a row hides all lower ones nearer than `distance`."""
    import numpy as np

    order, hidden, kept = np.argsort(-scores_K, kind="stable"), np.zeros(len(scores_K), dtype=bool), []
    for row in order.tolist():
        if hidden[row]:
            continue
        kept.append(row)
        hidden |= ((centres_K2 - centres_K2[row]) ** 2).sum(axis=1) < distance**2
    return np.array(kept, dtype=np.int64)


# --- the summary -----------------------------------------------------------------------------------------------------


def froc(lesions_L: np.ndarray, false_F: np.ndarray, n_slides: int, allowed: Sequence[float]) -> list[dict[str, Any]]:
    """Sensitivity for lesions at the lowest threshold with at most so many false positives a slide, on average.

    A lesion counts as found when a tile that touches it scores above the first false positive that is too many.
    """
    import numpy as np

    false_F = np.sort(false_F)[::-1]
    rows = []
    for mean_number in allowed:
        count = int(np.floor(mean_number * n_slides + 1e-9))
        beyond = float(false_F[count]) if count < len(false_F) else -np.inf
        found = int((lesions_L > beyond).sum())
        sensitivity = found / len(lesions_L) if len(lesions_L) and n_slides else None
        rows.append({"false_positives_per_slide": mean_number, "found": found, "sensitivity": sensitivity})
    return rows


def summarise(config: LesionConfig, found: Sequence[Found], passed_over: dict[str, list[str]]) -> dict[str, Any]:
    """What lesions.json holds: plain numbers, None where undefined."""
    import numpy as np

    lesions_L = np.concatenate([one.lesions_L for one in found])
    counted = [one.false_F for one in found if one.false_F is not None]
    curve = froc(lesions_L, np.concatenate([*counted, np.empty(0)]), len(counted), config.false_positives)
    sensitivities = [row["sensitivity"] for row in curve if row["sensitivity"] is not None]
    names = ["tile_auc", *(f"top{k}_{what}" for k in TOP for what in ("inside", "possible"))]
    return {
        "slides": len(found),
        "slides_with_lesions": sum(one.row["lesions"] > 0 for one in found),
        "slides_counting_false_positives": len(counted),
        "lesions": len(lesions_L),
        "lesions_without_tile": int(np.isinf(lesions_L).sum()),
        "per_slide": {name: mean_and_quartiles([one.row[name] for one in found]) for name in names},
        "froc": curve,
        "froc_mean_sensitivity": float(np.mean(sensitivities)) if sensitivities else None,
        "passed_over": passed_over,
        "not_exhaustive": config.not_exhaustive,
        "settings": config.model_dump(mode="json", include={"run", "which", "score", "target", "member", "negative",
                                                            "exclusion_groups", "inside", "merge_um", "apart_um"}),
    }  # fmt: skip


def mean_and_quartiles(values: Sequence[float | None]) -> dict[str, Any]:
    """Over the slides for which it is defined."""
    import numpy as np

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
    n_counting = summary["slides_counting_false_positives"]
    lines.append(f"  sensitivity for lesions at false positives a slide ({n_counting} slides count them)")
    for row in summary["froc"]:
        value = "undefined" if row["sensitivity"] is None else f"{row['sensitivity']:.3f}"
        lines.append(f"    {row['false_positives_per_slide']:>5g}  {value}  {row['found']} of {summary['lesions']}")
    if summary["froc_mean_sensitivity"] is not None:
        lines.append(f"    mean   {summary['froc_mean_sensitivity']:.3f}")
    for reason, slides in summary["passed_over"].items():
        if slides:
            shown = ", ".join(slides[:6]) + (", ..." if len(slides) > 6 else "")
            lines.append(f"  passed over, {reason}: {len(slides)} ({shown})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
