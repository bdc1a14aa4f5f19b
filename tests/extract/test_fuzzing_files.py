"""Damaged files of others' formats: Parquet, foreign HDF5, safetensors, slides: read, or refused by name.

Seeded loops, as in test_fuzzing.py. What native libraries read is read in a process of its own, so that a crash is
counted, with the mutation that did it, instead of ending the tests.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "damage.py"
EACH = {"parquet": 80, "clam": 120, "pt": 80, "safetensors": 80, "tiff": 120, "svs": 120, "png": 60}
"""Mutations of a kind, times MUTATIONS in the environment. (For text there are test_fuzzing.py and others.)"""


@pytest.fixture(scope="module")
def damage(script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(SCRIPT)


@pytest.mark.parametrize("kind", EACH)
def test_whatever_happens_to_a_file_it_is_read_or_refused_by_name(kind: str, damage: ModuleType) -> None:
    n = round(EACH[kind] * float(os.environ.get("MUTATIONS", "1")))
    found: Counter[str] = damage.in_a_worker(kind, seed=1, first=0, count=n)
    assert sum(found.values()) == n
    assert not {name: found[name] for name in damage.FAILURES if found[name]}
    assert found[damage.REFUSED], "damage is noticed at all"
