"""Where a place in an object store lies on this machine: `s3://lab/phikon` is worked on as a folder that mirrors it.

A config holds the local place, so that all code works on files; whatever is shown or written down has the address.
Which bytes go to and fro is the affair of `extract.stores`. Nothing slow is imported here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure")}
"""Scheme -> the package that speaks with such stores, and the extra that installs it."""
URL = re.compile(r"(s3|gs|az):/+(.*)", re.DOTALL)
"""One slash too: `pathlib` makes one of two."""
CACHE = "SLIDE_MIL_CACHE"
ETAGS = ".etags"


def is_url(text: str) -> bool:
    """Whether the text is an address in an object store."""
    return bool(URL.fullmatch(text))


def root() -> Path:
    """The folder of all mirrors: `stores` in $SLIDE_MIL_CACHE, else in the user's cache folder."""
    given = os.environ.get(CACHE)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.path.realpath(Path(given) if given else Path(home) / "slide-mil")) / "stores"


def place_of(url: str) -> Path:
    """The local place of an address. The stores of another endpoint have places of their own.

    Raises:
        ValueError: with credentials or a signature in it, which would be written down; or a name that is no path.
    """
    found = URL.fullmatch(url)
    assert found is not None
    scheme, rest = found[1], found[2].rstrip("/")
    bucket, _, key = rest.partition("/")
    if "@" in bucket or ":" in bucket or "?" in rest or ("#" in rest and "sig=" in rest):
        raise ValueError(
            f"an address of {scheme}:// with credentials or a signature in it, which would be written into logs and "
            f"reports; expected {scheme}://BUCKET/NAME, and the credentials in the environment"
        )
    if not bucket or any(part in ("", ".", "..") for part in key.split("/")[: None if key else 0]):
        raise ValueError(f"expected {scheme}://BUCKET/NAME, got {url!r}")
    endpoint = re.sub(r"^https?://", "", os.environ.get("AWS_ENDPOINT_URL", "")) if scheme == "s3" else ""
    store = f"{scheme}@{re.sub(r'[^A-Za-z0-9.-]', '_', endpoint)}" if endpoint else scheme
    return root() / store / bucket / key if key else root() / store / bucket


def url_of(path: Path | str) -> str | None:
    """The address of a local place; None for all other paths."""
    text, base = os.fspath(path), f"{root()}{os.sep}"
    if not text.startswith(base):
        return None
    store, _, rest = text[len(base) :].partition(os.sep)
    scheme = store.partition("@")[0]
    return f"{scheme}://{rest}" if scheme in EXTRAS and rest else None


def shown(path: Path | str) -> str:
    """The path as a person knows it: the address of a place in a store."""
    return url_of(path) or os.fspath(path)


def in_words(text: str) -> str:
    """The text with addresses for the local places of stores."""
    pattern = re.escape(f"{root()}{os.sep}") + rf"({'|'.join(EXTRAS)})(?:@[A-Za-z0-9._-]*)?{re.escape(os.sep)}"
    return re.sub(pattern, lambda found: f"{found[1]}://", text)


def with_places(value: Any) -> Any:
    """A config's tree with local places for addresses. ValueError: see `place_of`."""
    if isinstance(value, dict):
        return {key: with_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_places(inner) for inner in value]
    if isinstance(value, str | Path) and is_url(str(value)):
        return str(place_of(str(value)))
    return value


def with_urls(value: Any) -> Any:
    """What `with_places` made, undone."""
    if isinstance(value, dict):
        return {key: with_urls(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_urls(inner) for inner in value]
    return url_of(value) or value if isinstance(value, str) else value
