"""For all tests: `python` runs commands with warnings as errors, `script` imports a file, `mutations` damage files."""

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # as many processes as cores: threads that wait for each other cost ten times as much
    os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = (
    *("test_ray", "test_machine", "test_train", "test_faults", "test_bytes", "test_finetune", "test_aggregators"),
    *("test_api", "test_kills", "test_warmstart", "test_tasks_applied", "test_damage", "test_passes", "test_tasks"),
    *("test_heatmap", "test_predict", "test_extraction", "test_confounding", "test_task_permutations"),
)
"""Files of half a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are handed to processes whole and in this order: a long one at the end would leave the others idle.

    (pytest-xdist would begin with those of the most tests, and the longest have few.)
    """
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The address of an S3 server in this process, on loopback at a free port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def breaking(s3: Any, object_store: str, script: Callable[[Path], ModuleType], monkeypatch: Any) -> Iterator[Any]:
    """The same server behind one that can refuse writes, or cut them off (tests/breaking_proxy.py)."""
    from extract.stores import client

    proxy = script(Path(__file__).with_name("breaking_proxy.py")).Proxy(object_store)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    few = client.OPTIONS["s3"]["config_kwargs"] | {"retries": {"max_attempts": 2, "mode": "standard"}}
    monkeypatch.setitem(client.OPTIONS["s3"], "config_kwargs", few)  # of four tries the pauses would be most of a test
    client.forget()
    client.filesystem("s3").retries = 2
    yield proxy
    client.forget()
    proxy.close()


SECRET = "neverToBeWrittenDown0123456789abcdefghij"


@pytest.fixture
def s3(object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system on that server with an empty bucket `lab`; mirrors lie below `tmp_path`.

    `s3.never_written` is the secret key, `s3.environment` what other processes need to reach it.
    """
    from extract.stores import client, looking

    environment = {"AWS_ENDPOINT_URL": object_store, "AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": SECRET}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1", "SLIDE_MIL_CACHE": str(tmp_path / "mirrors")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    client.forget()
    looking.forget()
    files = client.filesystem("s3")
    files.never_written, files.environment = SECRET, environment
    if files.exists("lab"):
        files.rm("lab", recursive=True)
    files.mkdir("lab")
    yield files
    client.forget()
    looking.forget()
