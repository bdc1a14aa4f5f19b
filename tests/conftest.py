"""For all tests: `python` runs commands with warnings as errors, `script` imports a file, `mutations` damage files."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # as many processes as cores: threads that wait for each other cost ten times as much
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def script() -> Callable[[Path], ModuleType]:
    """`script(path)`: a file that is in no package, imported under its own name."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def mutations(script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(Path(__file__).with_name("mutations.py"))


@pytest.fixture(scope="session")
def python() -> list[str]:
    """How a test starts a process of its own: `[*python, "-m", "mil.train", ...]`. Warnings are errors there too."""
    return [sys.executable, "-W", "error"]
