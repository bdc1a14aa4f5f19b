"""One sheet of an Excel workbook (.xlsx) as rows of text, as a person sees them; what has no value is refused."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from extract.config import ProblemsError, did_you_mean, first_line

ZIP = b"PK\x03\x04"
OLD_EXCEL = b"\xd0\xcf\x11\xe0"
"""How .xlsx and .xls begin."""

DAMAGED = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, SyntaxError),
    *(zlib.error, zipfile.BadZipFile),
)
"""What openpyxl meets in a file that is damaged, or a zip of something else; SyntaxError is broken XML."""


class ExcelError(ProblemsError):
    """A workbook cannot be read."""


def is_excel(path: Path) -> bool:
    """Told from how the file begins, whatever it is called."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == OLD_EXCEL:
        raise ExcelError("a table cannot be read", [f"{path}: an old Excel file (.xls); save it as .xlsx or CSV"])
    return start == ZIP


def sheet_rows(path: Path, sheet: str | None) -> list[list[str]]:
    """The cells of a sheet as text, row by row, the first holding the names; without empty rows and columns at its end.

    Args:
        sheet: its name; None: the only one that holds anything.

    Raises:
        ExcelError: no openpyxl, no workbook, no such sheet or several, formulas without a value, errors in cells.
    """
    try:
        import openpyxl
    except ImportError:
        problem = f"{path}: Excel tables need openpyxl: pip install 'slide-mil[excel]'; or save it as CSV"
        raise ExcelError("a table cannot be read", [problem]) from None
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what openpyxl would lose in saving
            shown, made = (openpyxl.load_workbook(file, data_only=values) for values in (True, False))
    except DAMAGED as error:
        problem = f"{path}: is no Excel workbook that can be read ({first_line(error)})"
        raise ExcelError("a table cannot be read", [problem]) from None
    name = _chosen(path, shown, sheet)
    without = list(_without_value(shown[name], made[name]))
    if without:
        some = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        problem = f"{path}: sheet {name!r}: cells without a value: {some}. Save it in Excel, or write what is meant"
        raise ExcelError("a table cannot be read", [problem])
    return _trimmed([[_text(cell) for cell in row] for row in shown[name].iter_rows(values_only=True)])


def _chosen(path: Path, book: Any, sheet: str | None) -> str:
    names = [one.title for one in book.worksheets]
    if sheet is not None:
        if sheet not in names:
            problem = f"{path}: no sheet {sheet!r}{did_you_mean(sheet, names)}. It has: {', '.join(names)}"
            raise ExcelError("a table cannot be read", [problem])
        return sheet
    filled = [one.title for one in book.worksheets if one.max_row > 1 or one.max_column > 1]
    if len(filled) > 1:
        problem = f"{path}: {len(filled)} sheets: {', '.join(filled)}. Say which: cohort.sheet={filled[0]!r}"
        raise ExcelError("a table cannot be read", [problem])
    return str((filled or names)[0])


def _without_value(shown: Any, made: Any) -> Iterator[str]:
    """Formulas that nobody has computed, which would read as empty, and #N/A, #REF! and the like."""
    for row in made.iter_rows():
        for cell in row:
            value = shown[cell.coordinate].value
            if cell.data_type == "f" and value is None:
                yield f"{cell.coordinate} (a formula that was never computed)"
            elif shown[cell.coordinate].data_type == "e":
                yield f"{cell.coordinate} ({value})"


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime):
        return cell.date().isoformat() if cell.time() == time() else cell.isoformat(sep=" ")
    return cell.isoformat() if isinstance(cell, date) else str(cell)


def _trimmed(rows: list[list[str]]) -> list[list[str]]:
    """Sheets end where something was once typed or coloured."""
    while rows and not any(rows[-1]):
        rows.pop()
    width = max((i + 1 for row in rows for i, cell in enumerate(row) if cell.strip()), default=0)
    return [row[:width] for row in rows]
