"""Slides: opening them, microns per pixel, the tissue on them, and the tiles of the tissue."""
