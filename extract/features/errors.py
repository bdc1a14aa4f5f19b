"""What is wrong with a feature file."""

from __future__ import annotations


class CacheError(Exception):
    """A feature file is missing, truncated, damaged, foreign or not what was asked for. The message names the file."""
