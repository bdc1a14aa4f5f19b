"""The table of layouts. To add a tool: one file beside this one, and one line here."""

from __future__ import annotations

from extract.features.layouts.cache import CacheLayout
from extract.features.layouts.clam import ClamLayout
from extract.features.layouts.histossl import HistoSslLayout
from extract.features.layouts.layout import Layout
from extract.features.layouts.slideflow import SlideflowLayout
from extract.features.layouts.stamp import StampLayout
from extract.features.layouts.torchmil import TorchmilLayout
from extract.features.layouts.trident import TridentLayout

LAYOUTS: dict[str, Layout] = {
    "cache": CacheLayout(),
    "clam": ClamLayout(),
    "trident": TridentLayout(),
    "stamp": StampLayout(),
    "histossl": HistoSslLayout(),
    "torchmil": TorchmilLayout(),
    "slideflow": SlideflowLayout(),
}
