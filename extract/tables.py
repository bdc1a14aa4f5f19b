"""CSV files: written so that a spreadsheet shows a name as text (extract.cells), read back as it was, all checked."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from extract.cells import NUMBER, plain_cell, safe_cell
from extract.config import ProblemsError, first_line
from extract.excel import ExcelError, is_excel, sheet_rows
from extract.whole import replace_on_success

WHOLE = re.compile(r"-?\d{1,19}(\.0+)?", re.ASCII)


class TableError(ProblemsError):
    """A table cannot be read, or says what it cannot say."""


@dataclass(frozen=True)
class Column:
    """What a column may hold.

    kind: text, whole numbers, or numbers. blank: empty cells are allowed (NaN for numbers). least, most: both allowed.
    among: the texts that are allowed. infinite: so are inf and -inf.
    """

    kind: Literal["text", "whole", "number"]
    least: float = -np.inf
    most: float = np.inf
    blank: bool = False
    among: tuple[str, ...] = ()
    infinite: bool = False

    @property
    def wanted(self) -> str:
        """In words."""
        if self.among:
            return "one of " + ", ".join(repr(name) for name in self.among)
        what = {"text": "a text", "whole": "a whole number", "number": "a number"}[self.kind]
        low = "" if np.isinf(self.least) else f" from {self.least:g}"
        high = "" if np.isinf(self.most) else f" to {self.most:g}"
        return what + low + high + (", or nothing" if self.blank else "")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """The table as CSV, without its index, whole or not at all; texts are safe to open in a spreadsheet."""
    safe, returns = table.copy(deep=False), False
    safe.columns = pd.Index([safe_cell(str(name)) for name in table.columns])
    for place in range(safe.shape[1]):
        column = safe.iloc[:, place]
        if not pd.api.types.is_numeric_dtype(column.dtype):
            cells = [safe_cell(cell) if isinstance(cell, str) else cell for cell in column]
            safe.isetitem(place, np.array([*cells, None], dtype=object)[:-1])
            returns = returns or any(isinstance(cell, str) and "\r" in cell for cell in cells)
    # Python's csv leaves a lone carriage return unquoted, where readers see the end of a line
    quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    with replace_on_success(path) as temporary:
        safe.to_csv(temporary, index=False, encoding="utf-8", quoting=quoting)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_texts(path: Path, title: str = "a table cannot be read", *, sheet: str | None = None) -> pd.DataFrame:
    """All cells as text, "" where there is nothing; column names without spaces around them.

    CSV with commas, semicolons or tabs, told from the first line; or a sheet of an Excel workbook.

    Raises:
        TableError: no such file, neither CSV of UTF-8 nor .xlsx, rows of unequal length, no such sheet.
    """
    try:
        if is_excel(path):
            raw = _of_sheet(path, sheet)
        else:
            raw = _of_text(path)
    except ExcelError as error:
        raise TableError(title, error.problems) from None
    except UnicodeDecodeError as error:
        told = f"{first_line(error)}. Save it as CSV UTF-8"
        raise TableError(title, [f"{path}: {told}"]) from None
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        raise TableError(title, [f"{path}: {first_line(error)}{_of_long_rows(path, error)}"]) from None
    raw.columns = [plain_cell(str(name).strip()) for name in raw.columns]
    for place in range(raw.shape[1]):
        cells = [plain_cell(cell) for cell in raw.iloc[:, place].tolist()]  # not one by one out of Arrow
        raw.isetitem(place, np.array([*cells, None], dtype=object)[:-1])
    return raw


def _of_sheet(path: Path, sheet: str | None) -> pd.DataFrame:
    names, *rows = sheet_rows(path, sheet) or [[]]
    if not names:
        raise ValueError("the sheet is empty")
    nameless = sum(not name.strip() for name in names)
    if nameless or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1 and name.strip()})
        told = f"columns of the same name {twice}" if twice else f"{nameless} columns without a name"
        raise ValueError(f"{told}; the first row of the sheet must hold the columns' names, each once")
    return pd.DataFrame(rows, columns=names, dtype=str)


def _of_text(path: Path) -> pd.DataFrame:
    separator, before = separator_of(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows that are too long lose their end otherwise
        return pd.read_csv(
            path,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            index_col=False,
            sep=separator,
            skiprows=before,
        )


SEPARATORS = (",", ";", "\t")


def separator_of(path: Path) -> tuple[str, int]:
    """What stands most often between the names of the first line, outside quotes; a comma where nothing does.

    And how many lines come before the names: one where Excel wrote `sep=;` first.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline(LONGEST_LINE)
    said = re.fullmatch(r"\"?sep=(.)\"?\s*", line)
    if said:
        return said[1], 1
    plain = re.sub(r'"[^"]*"', "", line)
    return max(SEPARATORS, key=plain.count), 0  # the first of equals


LONGEST_LINE = 1 << 20


def _of_long_rows(path: Path, error: BaseException) -> str:
    """What makes rows longer than the first: most often a decimal comma between commas."""
    if not isinstance(error, pd.errors.ParserWarning | pd.errors.ParserError):
        return ""
    return ". Rows have more cells than the first line has names: is a decimal comma among them? Write decimal points"


def read_table(path: Path, columns: Mapping[str, Column], *, also: Mapping[str, Column] | None = None) -> pd.DataFrame:
    """A table that this toolkit wrote: `columns`, which must be there, and those of `also` that are, as their types.

    Text that is blank stays "". Other columns stay text.

    Raises:
        TableError: it cannot be read, a column is missing, or cells hold what they cannot: of every column the first.
    """
    title = "a table was damaged or changed"
    raw = read_texts(path, title)
    absent = [f"{path}: no column {name!r}" for name in columns if name not in raw.columns]
    if absent or raw.empty:
        raise TableError(title, absent or [f"{path}: no rows"])
    wanted = dict(columns) | {name: column for name, column in (also or {}).items() if name in raw.columns}
    problems: list[str] = []
    for name, column in wanted.items():
        values, bad_N = _values(raw[name].tolist(), column)
        if bad_N.any():
            row = int(bad_N.argmax())
            more = f" (and {bad_N.sum() - 1} more such cells)" if bad_N.sum() > 1 else ""
            got = repr(str(raw[name].iloc[row]))[:60]
            problems.append(f"{path}: row {row + 2}: {name} is {got}, expected {column.wanted}{more}")
        else:
            raw[name] = values
    if problems:
        raise TableError(title, problems)
    return raw


def _values(cells: Sequence[str], column: Column) -> tuple[pd.Series, np.ndarray]:
    """The cells as the column's type, and which of them cannot be so."""
    blank_N = np.array([not cell for cell in cells], dtype=bool)
    if column.kind == "text":
        bad_N = blank_N & (not column.blank)
        if column.among:
            bad_N |= np.array([cell not in column.among for cell in cells], dtype=bool) & ~(blank_N & column.blank)
        return pd.Series(cells, dtype=object), bad_N
    values_N = np.array([_number(cell, column.kind == "whole") for cell in cells], dtype=np.float64)
    bad_N = np.isnan(values_N) & ~(blank_N & column.blank)
    bad_N |= (values_N < column.least) | (values_N > column.most) | (np.isinf(values_N) & (not column.infinite))
    if column.kind == "number" or blank_N.any() or bad_N.any():
        return pd.Series(values_N), bad_N
    whole = [int(cell.partition(".")[0]) for cell in cells]  # not by way of float64, which has 53 bits
    bad_N = np.array([not -(2**63) <= value < 2**63 for value in whole], dtype=bool)
    return pd.Series([0 if bad else value for bad, value in zip(bad_N, whole, strict=True)], dtype=np.int64), bad_N


def _number(cell: str, whole: bool) -> float:
    """NaN for what is none."""
    if not (WHOLE if whole else NUMBER).fullmatch(cell) and cell != "inf":
        return np.nan
    return float(cell)
