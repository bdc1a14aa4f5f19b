"""Outlines of regions in level-0 px: GeoJSON and ASAP XML."""
