"""Texts in the cells of a table: safe to open in a spreadsheet, and read back as they were. Light: no pandas.

A spreadsheet runs a cell that begins with = + - or @ (or with a tab, a line break, or the full-width forms) as a
formula (OWASP, "CSV Injection"). Names come from strangers' file names, so such a text gets an apostrophe in front,
which spreadsheets hide; reading takes it away again. Numbers stay as they are, also those in a column of text.
"""

from __future__ import annotations

import re

RISKY = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|-inf", re.ASCII)


def safe_cell(text: str) -> str:
    """The text as a CSV file holds it; `plain_cell` gives it back."""
    return f"'{text}" if RISKY.match(text) and not NUMBER.fullmatch(text) else text


def plain_cell(cell: str) -> str:
    """What `safe_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and RISKY.match(cell) else cell
