"""For all tests: `python`, which runs our own commands with warnings as errors; `mutations`, which damages files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def mutations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", Path(__file__).with_name("mutations.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def python() -> list[str]:
    """How a test starts a process of its own: `[*python, "-m", "mil.train", ...]`. Warnings are errors there too."""
    return [sys.executable, "-W", "error"]
