"""The table of feature folders that can be read, by the tool that wrote them.

To add a tool: a file in `extract/features/layouts/` with a subclass of `Layout` (extract.features.layouts.layout), and
its line below. Config, `--help`, detection and messages know it from here.

The table holds names, not classes, because `--help` and config errors must not wait for h5py.
"""

from __future__ import annotations

LAYOUTS = {
    "cache": "extract.features.layouts.cache:CacheLayout",
    "clam": "extract.features.layouts.clam:ClamLayout",
    "trident": "extract.features.layouts.trident:TridentLayout",
    "stamp": "extract.features.layouts.stamp:StampLayout",
    "histossl": "extract.features.layouts.histossl:HistoSslLayout",
    "torchmil": "extract.features.layouts.torchmil:TorchmilLayout",
    "slideflow": "extract.features.layouts.slideflow:SlideflowLayout",
    "slide2vec": "extract.features.layouts.slide2vec:Slide2VecLayout",
    "atlaspatch": "extract.features.layouts.atlaspatch:AtlasPatchLayout",
    "eva": "extract.features.layouts.eva:EvaLayout",
    "lazyslide": "extract.features.layouts.lazyslide:LazySlideLayout",
}
