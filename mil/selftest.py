"""python -m mil.selftest [key=value ...]

Three algorithmic unit tests of what an aggregator takes for evidence (Raff and Holt, NeurIPS 2023, algorithms 1 to 3).
Bags are made up so that a rule which respects multiple-instance learning ("a tile can make a slide positive, none can
make it negative") solves training and test, and a shortcut that only training rewards is wrong in the test:

    one concept    positive bags hold 1 to 3 tiles of a concept; training hides an obvious poison tile in negative
                   bags, the test in positive ones; once far below everything else, once far above
    two concepts   positive only with tiles A and C together, negative bags hold one of them; poison as above
    frequency      positive with one A and one C; negative bags hold one tile of one concept in training, 35 to 44 of it
                   in the test

All seeds of an aggregator train as members in one pass. A seed passes a test when its training and test AUC are clearly
above 0.5 (three standard errors of chance), and fails when the test AUC is clearly below although training is clearly
above. An aggregator passes when every seed passes, fails when at least one fails, and is inconclusive otherwise.
It is a diagnostic: most published aggregators fail at least one, also in the paper.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from extract.config import config_from_command_line, tell
from extract.ending import ended
from extract.lock import only_command_in
from extract.stores.sessions import stores_of
from mil.config_problems import model_problems
from mil.training.selftest_bags import TESTS, SelftestConfig


def problems(tree: dict[str, Any]) -> list[str]:
    """Names that are neither in the table nor torchmil's."""
    names = tree.get("aggregators")
    if not isinstance(names, list) or not names:
        return []  # the section itself reports it
    return [problem.replace("model.name", "aggregators", 1) for problem in model_problems({"name": names})]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 something fails and strict=true, 2 the arguments are wrong, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    defaults = ["strict=false"]  # without arguments there would be help
    config = config_from_command_line(SelftestConfig, arguments or defaults, __doc__ or "", also=problems)

    def run() -> int:
        with (
            only_command_in(config.out, "mil.selftest") if config.out else nullcontext(),
            stores_of(config, out=config.out),
        ):
            return run_tests(config, " ".join(["python -m mil.selftest", *arguments]))

    return ended(run, interrupted=lambda: "Interrupted; nothing was written.")


def run_tests(config: SelftestConfig, command: str) -> int:
    """All tests of all aggregators, printed and written; the exit code."""
    from extract.whole import write_whole  # these import torch: only now that the config is valid
    from mil.training.selftest import Result, new_aggregator, note, run_test, table

    for name in config.aggregators:
        try:
            new_aggregator(name, config)
        except ValueError as error:  # such as a torchmil model that needs more than features
            tell(error)
            return 2
    results: dict[str, dict[str, Result]] = {}
    for name in config.aggregators:
        results[name] = {}
        for test in TESTS:
            results[name][test] = run_test(test, name, config)
            print(f"{name}, {test}: {results[name][test]}", file=sys.stderr, flush=True)
    text = f"{table(results)}\n\n{note(config)}"
    print(text)
    if config.out:
        write_whole(config.out, f"`{command}`\n\n{text}\n")
    failed = any(result.verdict == "fails" for found in results.values() for result in found.values())
    return 1 if failed and config.strict else 0


if __name__ == "__main__":
    sys.exit(main())
