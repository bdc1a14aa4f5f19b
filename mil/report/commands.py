"""Commands that the page shows, for a shell, with names of the user in them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|y|n|null|nan|inf)$)[a-z][\w.-]*", re.IGNORECASE | re.ASCII)
"""A name that YAML reads as itself."""


def draw_slide(slide: str, where: Sequence[str]) -> str:
    """`python -m mil.heatmap run=. slide=s1`, quoted so that neither the shell nor YAML changes the name.

    Args:
        where: run=FOLDER, and what else says where slide and features are.
    """
    value = slide if PLAIN.fullmatch(slide) else json.dumps(slide, ensure_ascii=False)
    return shlex.join(["python", "-m", "mil.heatmap", *where, f"slide={value}"])
