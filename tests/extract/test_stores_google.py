"""gs:// against an emulator on loopback, where gcsfs and gcp-storage-emulator are installed (not in the test extra)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from extract.stores import client
from extract.stores.client import Missing

pytest.importorskip("gcsfs", reason="gcsfs is not installed")
emulator = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
pytestmark = [pytest.mark.stores, pytest.mark.filterwarnings("default")]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="lab")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    client.forget()
    server.start()
    yield "gs://lab"
    server.stop()
    client.forget()


def test_objects_are_put_listed_read_and_deleted(bucket: str, tmp_path: Path):
    """All but the conditional write of a lease, which the emulator does not know."""
    (tmp_path / "here.txt").write_text("hello")
    entry = client.put(tmp_path / "here.txt", f"{bucket}/a/b/x.txt")
    assert (entry.size, client.listing(f"{bucket}/a")) == (5, {"b/x.txt": entry})
    assert client.listing(f"{bucket}/none") == {}
    assert client.entry_of(f"{bucket}/a/none.txt") is None
    assert client.head(f"{bucket}/a/b/x.txt", 3) == b"hel"
    client.fetch(f"{bucket}/a/b/x.txt", tmp_path / "there.txt", entry)
    assert (tmp_path / "there.txt").read_text() == "hello"
    (tmp_path / "here.txt").write_text("other")
    assert client.put(tmp_path / "here.txt", f"{bucket}/a/b/x.txt").etag != entry.etag, "a tag changes with the content"
    client.delete(f"{bucket}/a/b/x.txt")
    client.delete(f"{bucket}/a/b/x.txt")
    assert client.listing(bucket) == {}
    with pytest.raises(Missing):
        client.head(f"{bucket}/a/b/x.txt", 3)
