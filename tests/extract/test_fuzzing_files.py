"""Damaged files of others' formats: Parquet, foreign HDF5, safetensors, slides: read, or refused by name.

Seeded loops, as in test_fuzzing.py. What native libraries read is read in a process of its own, so that a crash is
counted, with the mutation that did it, instead of ending the tests.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "damage.py"
EACH = {"parquet": 80, "clam": 120, "pt": 80, "safetensors": 80, "tiff": 120, "svs": 120, "png": 60}
"""Mutations of a kind, times MUTATIONS in the environment. (For text there are test_fuzzing.py and others.)"""


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", EACH)
def test_whatever_happens_to_a_file_it_is_read_or_refused_by_name(kind: str, fuzz: ModuleType) -> None:
    n = round(EACH[kind] * float(os.environ.get("MUTATIONS", "1")))
    found: Counter[str] = fuzz.in_a_worker(kind, seed=1, first=0, count=n)
    assert sum(found.values()) == n
    assert not {name: found[name] for name in fuzz.FAILURES if found[name]}
    assert found[fuzz.REFUSED], "damage is noticed at all"
