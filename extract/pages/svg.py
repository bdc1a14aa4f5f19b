"""An SVG file's text as an element within a page: no outside reference, no style sheet of its own, colours of the page.

The text is that of matplotlib; nothing here imports it.
"""

from __future__ import annotations

import re

from markupsafe import Markup

from extract.pages.colours import VARIABLES

_VARIABLE = {colour.lower(): f"var(--{name})" for colour, name in VARIABLES.items()}
_CELLS = re.compile(r'(<g id="QuadMesh_\d+">.*?</g>)', re.DOTALL)
_COLOUR = re.compile(r"(?<=[ :])#[0-9a-f]{6}\b")
_STYLE = re.compile(r'(?<= style=")[^"]*(?=")')


def inline_svg(text: str, name: str, title: str) -> Markup:
    """The SVG as an element whose ids begin with `name`, so that they differ from those of other figures.

    Args:
        text: the file, as `Figure.savefig(format="svg", transparent=True)` writes it.
        name: of the figure, unique within the page.
        title: what a screen reader says of it.

    Raises:
        RuntimeError: the SVG has no viewBox.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would apply to the whole page; the page has it too
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    if box is None:
        raise RuntimeError(f"figure {name}: expected matplotlib's SVG to have a viewBox, got {head!r}")
    rest = _with_own_ids(_in_colours_of_the_page(rest), name)
    label = f"{name}-title"
    # what has no colour of its own, such as matplotlib's black text, has that of the page's text
    return Markup('<svg {} role="img" aria-labelledby="{}" fill="currentColor"><title id="{}">{}</title>').format(
        Markup(box[0]), label, label, title
    ) + Markup(rest)


def _in_colours_of_the_page(text: str) -> str:
    """Colours of the palette become variables, but for the cells of a heat table: their shade is the number."""
    parts = _CELLS.split(text)
    return "".join(part if i % 2 else _STYLE.sub(_recoloured, part) for i, part in enumerate(parts))


def _recoloured(style: re.Match[str]) -> str:
    return _COLOUR.sub(lambda colour: _VARIABLE.get(colour[0], colour[0]), style[0])


def _with_own_ids(text: str, name: str) -> str:
    new = {old: f"{name}-{i}" for i, old in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', text)))}
    text = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{new[m[1]]}"', text)
    return re.sub(r'(url\(#|href="#)([^")]+)', lambda m: m[1] + new[m[2]], text)
