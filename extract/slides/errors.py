"""What can be wrong with a slide."""

from __future__ import annotations

from extract.config import ProblemsError


class SlideError(Exception):
    """A slide cannot be used. The message names the file."""


class SlideOpenError(SlideError):
    """The file is missing, of no known format, or damaged in its header."""


class SlideReadError(SlideError):
    """A region's pixels cannot be decoded. The slide stays usable: its handle has been reopened."""


class MppError(SlideError):
    """Microns per pixel are not stated, or cannot be right."""


class SlideFolderError(ProblemsError):
    """A folder holds no slides, or two files for one slide id."""
