"""A page's head, its script, and what its text lacks until it is finished: captions, scopes, ids and contents.

A page is one file that fetches nothing, and its policy (a Content-Security-Policy within the page) forbids all that
it does not need, so that no text in it, whoever wrote it, can run or send anything. It can be read without the script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Container, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from markupsafe import Markup

HERE = Path(__file__).parent
STYLE = (HERE / "style.css").read_text(encoding="utf-8")
SCRIPT = (HERE / "script.js").read_text(encoding="utf-8")
CONTENTS = "<!-- contents -->"
"""Where the links to the sections below stand; a page of fewer than FEWEST has none."""
FEWEST = 4

_HEADING = re.compile(r"<h([1-6])(?: [^>]*)?>(.*?)</h\1>", re.DOTALL)
_TABLE = re.compile(r"<table(?: [^>]*)?>.*?</table>", re.DOTALL)
_TH = re.compile(r"<th(?![^>]*\bscope=)(?=[ >])")
_FIRST_CELL = re.compile(r"(<tr(?: [^>]*)?>\s*)<td(?=[ >])(.*?)</td>", re.DOTALL)


def policy(script: str = SCRIPT) -> str:
    """What the page may do: its own styles, pictures within it, and the one script whose hash this is."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def head(title: str, style: str = "") -> Markup:
    """Everything within <head>. style: what this kind of page has beside style.css."""
    return Markup(
        '<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<title>{}</title>\n<style>\n{}</style>"
    ).format(Markup(policy()), title, Markup(STYLE + style))


def script() -> Markup:
    """The script, for the end of the body."""
    return Markup(f"<script>{SCRIPT}</script>")


def as_data(value: Any) -> Markup:
    """Numbers for the script as JSON within the page; nothing in it can be taken for markup.

    Raises:
        ValueError: a number is infinite or none.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def finished(html: str) -> str:
    """The page with tables that screen readers can read, ids for its headings, and links to them.

    Tables without a caption get their heading as one that is not shown; cells of a header row say that they head a
    column, and the first cell of other rows that it heads the row.
    """
    return _with_contents(_with_table_heads(html))


def _with_table_heads(html: str) -> str:
    made, end, heading = [], 0, ""
    for found in _headings_and_tables(html):
        made.append(html[end : found.start()])
        if found.re is _HEADING:
            heading = _plain(found[2])
            made.append(found[0])
        else:
            made.append(_table(found[0], heading))
        end = found.end()
    return "".join([*made, html[end:]])


def _headings_and_tables(html: str) -> Iterator[re.Match[str]]:
    both = [*_HEADING.finditer(html), *_TABLE.finditer(html)]
    yield from sorted(both, key=lambda found: found.start())


def _table(html: str, heading: str) -> str:
    opening, rest = html.split(">", 1)
    top, end_of_top, body = rest.rpartition("</thead>")
    caption = "" if "<caption" in html else f'<caption class="unseen">{heading}</caption>'
    body = _TH.sub('<th scope="row"', _FIRST_CELL.sub(r'\1<th scope="row"\2</th>', body))
    return f"{opening}>{caption}" + _TH.sub('<th scope="col"', top) + end_of_top + body


def _with_contents(html: str) -> str:
    before, mark, after = html.partition(CONTENTS)
    if not mark:
        return html
    links: dict[str, str] = {}

    def with_id(found: re.Match[str]) -> str:
        section, attributes, text = found.groups()
        name = section or _free_name(_plain(text), links)
        links[name] = f'<li><a href="#{name}">{_plain(text)}</a></li>'
        return found[0] if section else f'<h2 id="{name}"{attributes}>{text}</h2>'

    after = re.sub(r'(?:(?<=<section id=")([^"]+)">\s*)?<h2((?: [^>]*)?)>(.*?)</h2>', with_id, after, flags=re.DOTALL)
    if len(links) < FEWEST:
        return before + after
    listed = "\n".join(links.values())
    return f'{before}<nav aria-label="Contents"><ul>\n{listed}\n</ul></nav>{after}'


def _free_name(text: str, taken: Container[str]) -> str:
    name = "to-" + re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return next(free for free in chain([name], (f"{name}-{i}" for i in count(2))) if free not in taken)


def _plain(html: str) -> str:
    """Text of a heading, still escaped."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())
