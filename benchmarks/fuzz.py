"""Coverage-guided fuzzing of the two parsers of foreign bytes that are ours: outlines, and layouts of feature folders.

    pip install atheris
    python benchmarks/fuzz.py outlines -runs=200000
    python benchmarks/fuzz.py layouts -runs=20000 -max_total_time=600

Everything after the target goes to libFuzzer. What counts as found is any exception besides the refusals that these
parsers document; libFuzzer then writes the bytes to a file crash-*. Without atheris the seeded loops of the tests
(`MUTATIONS=100 pytest tests/mil/test_outlines_hostile.py tests/extract/test_layouts.py`) try the same without guidance.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

SUFFIXES = (".xml", ".geojson")
FILES = ("s.h5", "s.npy", "s.pt", "s.json", "s.parquet")
"""What feature folders of other tools hold; the first byte of an input chooses which it is."""


def outlines(data: bytes) -> None:
    """One file of outlines, ASAP or GeoJSON by its first byte."""
    from extract.outlines.shapes import OutlineError
    from mil.look.outlines import read_outlines

    if not data:
        return
    path = Path(tempfile.gettempdir()) / f"fuzz-outlines-{data[0] % len(SUFFIXES)}{SUFFIXES[data[0] % len(SUFFIXES)]}"
    path.write_bytes(data[1:])
    try:
        assert read_outlines(path).area.is_valid
    except OutlineError:
        return


def layouts(data: bytes) -> None:
    """A folder with one feature file: which tool wrote it, its header, coordinates and features."""
    from extract.config import ProblemsError
    from extract.features.cache import CacheError
    from extract.features.folder import open_feature_folder

    if not data:
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILES[data[0] % len(FILES)]).write_bytes(data[1:])
        try:
            features = open_feature_folder(Path(folder))
            for slide in features.slides:
                features.header(slide)
                features.features(slide)
                features.coords(slide)
        except (CacheError, ProblemsError):
            return


TARGETS = {"outlines": outlines, "layouts": layouts}


def main() -> int:
    """Exit code: libFuzzer's, or 2 where atheris or the target's name is missing."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        print(
            f"expected one of {', '.join(TARGETS)}; for instance: python benchmarks/fuzz.py outlines", file=sys.stderr
        )
        return 2
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["mil.look", "extract.features"]):
        import extract.features.folder  # noqa: F401 - instrumented while it is imported
        import mil.look.outlines  # noqa: F401
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
