"""python -m mil.lesions run=RUN annotations=FOLDER [key=value ...]

How well tile scores find lesions that a pathologist outlined: tile AUC, the share of the top tiles inside, and the
sensitivity for lesions at stated numbers of false positives a slide (FROC). FOLDER holds SLIDE.xml (ASAP, as in
Camelyon16) or SLIDE.geojson. Camelyon16's isolated tumour cells are left out of the sensitivity, as in its evaluation.
Writes lesions.csv (one row a slide) and lesions.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from extract.config import config_from_command_line
from extract.ending import ended
from extract.lock import only_command_in
from extract.places import shown
from extract.stores.sessions import stores_of
from mil.look.lesion_config import LesionConfig, lesion_problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 something is wrong (nothing written), 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(LesionConfig, arguments, __doc__ or "", also=lesion_problems)

    def check() -> int:
        with only_command_in(config.out, "mil.lesions"), stores_of(config, out=config.out):
            from mil.look.lesions import check_lesions, summary_text, write_lesions  # torch: only for a valid config

            table, summary = check_lesions(config)
            written = write_lesions(config.out, table, summary)
        print("\n".join([summary_text(summary), "", *map(shown, written)]))
        return 0

    return ended(check, interrupted=lambda: "Interrupted.", known=drawing_errors)


def drawing_errors() -> tuple[type[Exception], ...]:
    """What tile scores raise besides ProblemsError."""
    from extract.features.cache import CacheError
    from extract.slides.errors import SlideError

    return CacheError, SlideError


if __name__ == "__main__":
    sys.exit(main())
