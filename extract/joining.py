"""A cohort's rows out of one table, or of two (patient -> label, patient -> slide) joined on the patient, as in STAMP.

Here too: what the columns are called elsewhere, file endings in slide names, numbers with a decimal comma.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pandas as pd

from extract.config import Columns, ProblemsError, Tables, did_you_mean
from extract.tables import read_texts
from extract.wording import count, name_some

TCGA = "tcga"
"""`columns.patient=tcga`, `columns.site=tcga`: from the slide's barcode, unless the CSV has a column of that name."""
BARCODE = re.compile(r"TCGA-([A-Z0-9]{2})-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)
"""TCGA-TSS-PARTICIPANT: the first 12 characters name the patient, TSS is the tissue source site (GDC Encyclopedia)."""

COMMON = {
    "slide": {"slide_id": "CLAM", "FILENAME": "STAMP", "image_id": "PANDA", "slide_name": ""},
    "patient": {
        "case_id": "CLAM",
        "PATIENT": "STAMP",
        "PATIENT_ID": "cBioPortal",
        "submitter_id": "",
    },
    "label": {"isup_grade": "PANDA", "class": "", "target": "", "diagnosis": "", "subtype": ""},
    "time": {"OS_MONTHS": "cBioPortal", "DFS_MONTHS": "cBioPortal", "PFS_MONTHS": "cBioPortal", "survival_months": ""},
    "event": {"OS_STATUS": "cBioPortal", "DFS_STATUS": "cBioPortal", "PFS_STATUS": "cBioPortal"},
    "split": {"cohort_split": "", "fold_split": ""},
    "site": {"hospital": "", "center": "", "centre": "", "institution": "", "data_provider": "PANDA"},
}
"""Role of a column -> what tools and portals call it, and which."""
ENDINGS = (
    *(".ome.tiff", ".ome.tif", ".svs", ".tiff", ".tif", ".ndpi", ".mrxs", ".scn", ".dcm", ".vms", ".vmu", ".bif"),
    *(".vsi", ".czi", ".isyntax", ".jpeg", ".jpg", ".png", ".h5", ".pt", ".npy"),
)
"""Of slide and feature files, as they stand in the names of tables."""


class JoinError(ProblemsError):
    """Two tables do not fit together."""


# --- columns -------------------------------------------------------------------------------------------------------


def suggested(role: str, header: Iterable[str]) -> str | None:
    """The column that has this role under a name that is in common use."""
    by_plain = {name.strip().lower(): name for name in header}
    wanted = (role, *COMMON.get(role, {}))
    return next((by_plain[name.lower()] for name in wanted if name.lower() in by_plain), None)


def hint(role: str, name: str, header: Sequence[str]) -> str:
    """`; set columns.slide=FILENAME (STAMP)`, else what is spelled alike."""
    near, alike = suggested(role, header), did_you_mean(name, header)
    if near is None or (alike and (name != role or near.lower() == name.lower())):  # what somebody mistyped
        return alike
    whose = {known.lower(): tool for known, tool in COMMON.get(role, {}).items()}.get(near.lower(), "")
    return f"; set columns.{role}={near}" + (f" (as {whose} calls it)" if whose else "")


def absent_column(where: object, role: str, name: str, header: Sequence[str]) -> str:
    """The sentence for a column that is not there."""
    return f"{where}: no column {name!r} (columns.{role}){hint(role, name, header)}. It has: {', '.join(header)}"


# --- rows ----------------------------------------------------------------------------------------------------------


def read_rows(cohort: Path | Tables, columns: Columns) -> tuple[pd.DataFrame, list[str]]:
    """The cohort's rows, all cells text, a row a slide; and what is worth knowing of how two tables were joined.

    Raises:
        TableError: a table cannot be read.
        JoinError: two tables lack their columns, have no patient in common, or say different things.
    """
    if not isinstance(cohort, Tables):
        return read_texts(cohort), []
    if cohort.file is not None:
        return read_texts(cohort.file, sheet=cohort.sheet), []
    assert cohort.clinical is not None
    assert cohort.slides is not None
    clinical = read_texts(cohort.clinical, sheet=cohort.sheet)
    slides = read_texts(cohort.slides, sheet=cohort.slides_sheet)
    return joined(clinical, slides, cohort, columns)


def header_of(cohort: Path | Tables) -> list[str]:
    """The names of all columns, of two tables those of both."""
    if not isinstance(cohort, Tables):
        return list(read_texts(cohort).columns)
    sheets = {cohort.file: cohort.sheet, cohort.clinical: cohort.sheet, cohort.slides: cohort.slides_sheet}
    return [name for file in cohort.files for name in read_texts(file, sheet=sheets[file]).columns]


def joined(
    clinical: pd.DataFrame, slides: pd.DataFrame, tables: Tables, columns: Columns
) -> tuple[pd.DataFrame, list[str]]:
    """Every row of `slides` with the cells of its patient in `clinical`, empty where that lacks the patient."""
    key, of_slides = columns.patient, tables.slides_patient or columns.patient
    barcodes = of_slides == TCGA and TCGA not in slides.columns
    if barcodes and key == TCGA:
        key = suggested("patient", clinical.columns) or key
    problems = [] if key in clinical else [absent_column(tables.clinical, "patient", key, list(clinical.columns))]
    if columns.slide not in slides:
        problems.append(absent_column(tables.slides, "slide", columns.slide, list(slides.columns)))
    if not barcodes and of_slides not in slides:
        near = suggested("patient", slides.columns)
        advice = f"; set cohort.slides_patient={near}" if near else did_you_mean(of_slides, list(slides.columns))
        problems.append(
            f"{tables.slides}: no column {of_slides!r}, which says whose the slide is{advice}. It has: "
            + ", ".join(slides.columns)
        )
    if problems:
        raise JoinError("two tables cannot be joined", problems)
    whose = [cell.strip() for cell in slides[columns.slide if barcodes else of_slides]]
    if barcodes:
        whose = [match[0].upper() if (match := BARCODE.match(slide)) else "" for slide in whose]
    patients = [cell.strip() for cell in clinical[key]]
    rows, problems = _rows_of(clinical.assign(**{key: patients}), key, str(tables.clinical))
    return _both(rows, slides, whose, key, tables, columns, problems)


def _rows_of(clinical: pd.DataFrame, key: str, where: str) -> tuple[pd.DataFrame, list[str]]:
    """A row a patient, and which patients have rows that differ."""
    alone = clinical[clinical[key] != ""].drop_duplicates()
    twice = sorted(set(alone[key][alone[key].duplicated()]))
    problems = (
        [f"{where}: {count(len(twice), 'patient')} with rows that differ: {name_some(twice)}. Keep one row a patient"]
        if twice
        else []
    )
    return alone.drop_duplicates(key).set_index(key), problems


def _both(
    rows: pd.DataFrame,
    slides: pd.DataFrame,
    whose: list[str],
    key: str,
    tables: Tables,
    columns: Columns,
    problems: list[str],
) -> tuple[pd.DataFrame, list[str]]:
    known = [patient in rows.index for patient in whose]
    alone = sorted({patient for patient, there in zip(whose, known, strict=True) if not there})
    without = sorted(set(rows.index) - set(whose))
    told = []
    if alone:
        told.append(
            f"{count(known.count(False), 'slide')} of {count(len(alone), 'patient')} in {tables.slides} that "
            f"{tables.clinical} does not have: {name_some(alone)}. They stay without a label"
        )
    if without:
        told.append(
            f"{count(len(without), 'patient')} in {tables.clinical} without a slide in {tables.slides}: "
            f"{name_some(without)}"
        )
    if not any(known):
        raise JoinError(
            "two tables cannot be joined",
            [*problems, "no patient is in both tables; make the names equal, or set cohort.slides_patient", *told],
        )
    more = rows.reindex(whose).fillna("").reset_index(drop=True)
    both = [name for name in more if name in slides]
    named = [[given] if isinstance(given, str) else given for given in columns.model_dump().values()]
    used = {name for names in named for name in names or ()}
    for name in both:
        differ = [
            slide
            for slide, ours, theirs, there in zip(slides[columns.slide], slides[name], more[name], known, strict=True)
            if there and ours.strip() != theirs.strip()
        ]
        if differ and name in used:
            problems.append(
                f"column {name!r} is in {tables.slides} and in {tables.clinical}, and differs for "
                f"{count(len(differ), 'slide')}: {name_some(differ)}. Take it out of one of them"
            )
    if problems:
        raise JoinError("two tables cannot be joined", problems)
    table = pd.concat([slides.reset_index(drop=True), more.drop(columns=both)], axis=1)
    if columns.patient != TCGA or TCGA in slides:
        table[columns.patient] = whose
    return table, told


# --- names and numbers ---------------------------------------------------------------------------------------------


def without_ending(name: str) -> str:
    """The slide's name without the ending of its file."""
    low = name.lower()
    found = next((ending for ending in ENDINGS if low.endswith(ending) and len(low) > len(ending)), "")
    return name[: len(name) - len(found)]


def names_without_endings(names: Sequence[str], there: Collection[str]) -> list[str] | None:
    """All names as they are in `there`, where dropping their file endings brings that about; else None."""
    if all(name in there for name in names):
        return None
    plain = [name if name in there else without_ending(name) for name in names]
    return plain if all(name in there for name in plain) and len(set(plain)) == len(set(names)) else None


COMMA = re.compile(r"[+-]?\d+,\d+")
NUMBER_OR_COMMA = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")


def decimal_commas(raw: pd.DataFrame, names: Iterable[str], where: str, nothing: Collection[str]) -> list[str]:
    """Columns of numbers some of which have a decimal comma, in one line each."""
    problems = []
    for name in dict.fromkeys(name for name in names if name in raw.columns):
        cells = [str(cell).strip() for cell in raw[name]]
        commas = [(row, cell) for row, cell in enumerate(cells) if COMMA.fullmatch(cell)]
        if commas and all(NUMBER_OR_COMMA.fullmatch(cell) or cell.lower() in nothing for cell in cells):
            row, cell = commas[0]
            problems.append(
                f"{where}: {name}: {count(len(commas), 'number')} with a decimal comma, first {cell!r} in row {row + 2}"
                ". Write decimal points (in Excel: File, Options, Advanced, decimal separator)"
            )
    return problems
