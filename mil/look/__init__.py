"""Tile scores laid on the slide: drawing, GeoJSON, outlines, scenes."""
