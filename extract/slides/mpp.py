"""Microns per pixel: who states them, and who is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from extract.slides.errors import MppError

MPP_RANGE = (0.005, 1000.0)
"""Microns per pixel that a slide format's own field may state. Overview images of real slides reach 30."""

TIFF_MPP_RANGE = (0.02, 10.0)
"""The same for TIFF resolution tags, which many programs fill with a printer's 72 or 300 dpi (353 or 85 microns)."""

SQUARE_PIXEL_TOLERANCE = 0.01


def choose_mpp(
    path: Path, mpp: float | None, properties: Mapping[str, str], default_mpp: float | None
) -> tuple[float, str]:
    """Microns per level-0 pixel and who says so: the CSV, else the file, else `slides.mpp`; MppError if nobody does."""
    if mpp is not None and not math.isnan(mpp):  # an empty cell of the CSV is NaN
        if not (math.isfinite(mpp) and mpp > 0):
            raise MppError(f"{path}: expected a positive number of microns per pixel in the CSV, got {mpp}")
        return float(mpp), "csv"
    stated, remark = _mpp_of_file(properties)
    if stated:
        x, y = stated
        if abs(x - y) > SQUARE_PIXEL_TOLERANCE * min(x, y):
            raise MppError(
                f"{path}: pixels are not square ({x:g} microns wide, {y:g} high). Resample the slide, or give one "
                "number in the mpp column of the cohort CSV to treat them as square"
            )
        return (x + y) / 2, "file"
    if default_mpp is not None:
        return float(default_mpp), "slides.mpp"
    raise MppError(
        f"{path}: microns per pixel unknown{remark}. Three ways to say it: a file whose properties state it "
        "(openslide.mpp-x or TIFF resolution tags), an mpp column in the cohort CSV, or slides.mpp=... for all slides "
        "whose files do not say. An objective power such as 20x or 40x alone is not enough: scanners differ"
    )


def _mpp_of_file(properties: Mapping[str, str]) -> tuple[tuple[float, float] | None, str]:
    """(x, y) microns per level-0 pixel as the file states them, and a remark about what was not believed."""
    by_tags = properties.get("openslide.vendor", "generic-tiff") == "generic-tiff"  # OpenSlide then used the tags
    x, y = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if not (x and y):
        by_tags = True
        microns = {"inch": 25_400.0, "centimeter": 10_000.0}.get(properties.get("tiff.ResolutionUnit", ""), 0.0)
        per_unit = [_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
        x, y = (microns / value if value else 0.0 for value in per_unit)
    if not (x and y):
        return None, ""
    low, high = TIFF_MPP_RANGE if by_tags else MPP_RANGE
    if low <= x <= high and low <= y <= high:
        return (x, y), ""
    where = "its TIFF resolution tags say" if by_tags else "its properties say"
    return None, f" ({where} {x:g} x {y:g}, which no microscope makes, so they are not believed)"


def _number(text: str | None) -> float:
    """0.0 for what is absent, no number, or not finite."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value > 0 else 0.0
