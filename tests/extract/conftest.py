"""`slides`: the module that paints and writes test slides (tests are not a package, so it is loaded by path)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def slides() -> ModuleType:
    spec = importlib.util.spec_from_file_location("extract_test_slides", Path(__file__).with_name("slides.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
