"""gs:// against an emulator on loopback, az:// against a small server there; where gcsfs and gcp-storage-emulator, or
adlfs, are installed (not in the test extra).

The small server speaks as much of the Blob service's REST as is needed: Put, Get, Head and Delete Blob, List Blobs,
`If-None-Match: *`."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from extract.stores import client
from extract.stores.client import Exists, Missing

pytestmark = [pytest.mark.stores, pytest.mark.filterwarnings("default")]
ACCOUNT = "devstoreaccount1"
KEY = "bm90IGEgc2VjcmV0"


class Blobs(BaseHTTPRequestHandler):
    """One container, `lab`, in the server's memory."""

    protocol_version = "HTTP/1.1"
    blobs: ClassVar[dict[str, bytes]]

    def log_message(self, *given: object) -> None:
        """Nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        given = {"Content_Length": str(len(body)), "Last_Modified": formatdate(0, usegmt=True), "x_ms_version": "2021"}
        for name, value in (given | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        said = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        body = b"" if self.command == "HEAD" else said
        self.answer(status, body, x_ms_error_code=code, Content_Type="application/xml")

    @property
    def blob(self) -> str:
        """Below the container; "" is the container."""
        return unquote(urlsplit(self.path).path).removeprefix(f"/{ACCOUNT}/lab").lstrip("/")

    def facts(self, content: bytes) -> dict[str, str]:
        tag = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return {"ETag": f'"{tag}"', "x_ms_blob_type": "BlockBlob", "Content_Type": "application/octet-stream"}

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["If-None-Match"] == "*" and self.blob in self.blobs:
            self.refuse(409, "BlobAlreadyExists")
            return
        self.blobs[self.blob] = content
        self.answer(201, **self.facts(content))

    def do_DELETE(self) -> None:
        if self.blobs.pop(self.blob, None) is None:
            self.refuse(404, "BlobNotFound")
        else:
            self.answer(202)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if asked.get("comp") == "list":
            self.answer(
                200, self.listed(asked.get("prefix", ""), asked.get("delimiter")), Content_Type="application/xml"
            )
        elif asked.get("restype") == "container":
            self.answer(200)
        elif self.blob not in self.blobs:
            self.refuse(404, "BlobNotFound")
        else:
            self.read_blob(self.blobs[self.blob])

    def read_blob(self, content: bytes) -> None:
        if self.command == "HEAD":
            self.answer(200, **self.facts(content) | {"Content_Length": str(len(content))})
            return
        part = re.match(r"bytes=(\d+)-(\d*)", self.headers["x-ms-range"] or self.headers["Range"] or "")
        if part is None:
            self.answer(200, content, **self.facts(content))
            return
        start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        span = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, content[start : end + 1], Content_Range=span, **self.facts(content))

    def listed(self, prefix: str, delimiter: str | None) -> bytes:
        entries, folders = [], set()
        for name, content in sorted(self.blobs.items()):
            if not name.startswith(prefix):
                continue
            below = name[len(prefix) :]
            if delimiter and delimiter in below:
                folders.add(prefix + below.partition(delimiter)[0] + delimiter)
                continue
            facts = self.facts(content)
            entries.append(
                f"<Blob><Name>{name}</Name><Properties><Etag>{facts['ETag'].strip(chr(34))}</Etag>"
                f"<Content-Length>{len(content)}</Content-Length><BlobType>BlockBlob</BlobType>"
                f"<Last-Modified>{formatdate(0, usegmt=True)}</Last-Modified></Properties></Blob>"
            )
        entries += [f"<BlobPrefix><Name>{name}</Name></BlobPrefix>" for name in sorted(folders)]
        head = (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="lab"><Prefix>{prefix}</Prefix>'
        )
        return f"{head}<Blobs>{''.join(entries)}</Blobs><NextMarker/></EnumerationResults>".encode()


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("adlfs", reason="adlfs is not installed")
    Blobs.blobs = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Blobs)
    endpoint = f"http://127.0.0.1:{server.server_port}/{ACCOUNT}"
    settings = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", settings)
    client.forget()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield "az://lab"
    server.shutdown()
    server.server_close()
    client.forget()


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
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


@pytest.mark.parametrize("cloud", ["azure", "google"])
def test_objects_are_put_listed_read_and_deleted(cloud: str, request: pytest.FixtureRequest, tmp_path: Path):
    bucket: str = request.getfixturevalue(cloud)
    (tmp_path / "here.txt").write_text("hello")
    entry = client.put(tmp_path / "here.txt", f"{bucket}/a/b/x.txt", new=True)
    assert (entry.size, client.listing(f"{bucket}/a")) == (5, {"b/x.txt": entry})
    assert client.listing(f"{bucket}/none") == {}
    assert client.entry_of(f"{bucket}/a/none.txt") is None
    assert client.head(f"{bucket}/a/b/x.txt", 3) == b"hel"
    client.fetch(f"{bucket}/a/b/x.txt", tmp_path / "there.txt", entry)
    assert (tmp_path / "there.txt").read_text() == "hello"
    if cloud == "azure":  # the emulator of the other does not know conditions
        with pytest.raises(Exists):
            client.put(tmp_path / "here.txt", f"{bucket}/a/b/x.txt", new=True)
    (tmp_path / "here.txt").write_text("other")
    assert client.put(tmp_path / "here.txt", f"{bucket}/a/b/x.txt").etag != entry.etag, "a tag changes with the content"
    client.delete(f"{bucket}/a/b/x.txt")
    client.delete(f"{bucket}/a/b/x.txt")
    assert client.listing(bucket) == {}
    with pytest.raises(Missing):
        client.head(f"{bucket}/a/b/x.txt", 3)
