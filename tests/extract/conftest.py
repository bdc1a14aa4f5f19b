"""`slides`, `textures`: modules that make test data (tests are not a package, so they are loaded by path)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def slides() -> ModuleType:
    return beside("slides")


@pytest.fixture(scope="session")
def textures() -> ModuleType:
    return beside("textures")


def beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"extract_test_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
