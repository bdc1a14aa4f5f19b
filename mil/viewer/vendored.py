"""Files of others that the page uses, kept as they were published, with their licence beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STATIC = Path(__file__).parent / "static"
VENDOR = STATIC / "vendor"


@dataclass(frozen=True)
class Vendored:
    """One file of a package of npm: where it lies in it, under which licence, and what it is made of besides."""

    package: str
    version: str
    inside: str
    licence: str
    sha256: str
    bundles: str = ""


VENDORED = {
    "openseadragon.min.js": Vendored(
        "openseadragon",
        "6.1.1",
        "build/openseadragon/openseadragon.min.js",
        "BSD-3-Clause",
        "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad",
    ),
    "annotorious.js": Vendored(
        "@annotorious/annotorious",
        "3.8.10",
        "dist/annotorious.js",
        "BSD-3-Clause",
        "21fe8846ed69296d7dae41db9ad5b6931d8cbb69eed93b003dbe816a8b123b42",
        "svelte, dequal, rbush, uuid (MIT), simplify-js (BSD-2-Clause)",
    ),
    "annotorious.css": Vendored(
        "@annotorious/annotorious",
        "3.8.10",
        "dist/annotorious.css",
        "BSD-3-Clause",
        "6fa6a0f184e21f7d29d5d5390db21d54d9b77201301fd4c5e1e961ae8c7eb27f",
    ),
}
"""Name in `static/vendor` -> what it is. Of Annotorious the form for images: it draws over a view that stands still.
The form for OpenSeadragon compiles shaders from text at run time, which the page's policy forbids (`unsafe-eval`)."""
LICENCES = {"openseadragon": "openseadragon-LICENSE.txt", "@annotorious/annotorious": "annotorious-LICENSE.txt"}
STYLE_OF_OPENSEADRAGON = "sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE="
"""Of the one rule that it adds to a page as a style element."""
