"""The digest of a file, as `sha256sum FILE` prints it, and of content that carries its own at its end."""

from __future__ import annotations

import hashlib
from pathlib import Path

SEAL = b"slide-mil sha256"
"""Stands before the digest at the end of sealed content."""


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(content: bytes | memoryview) -> bytes:
    """The content with its digest behind it. Readers of zip files, as torch.load, pass over what is behind the end."""
    return b"".join([content, SEAL, hashlib.sha256(content).digest()])


def unsealed(whole: bytes) -> bytes | None:
    """What `sealed` was given; None where that is not what was written, or was never sealed."""
    n_bytes = hashlib.sha256().digest_size
    content, seal, digest = whole[: -n_bytes - len(SEAL)], whole[-n_bytes - len(SEAL) : -n_bytes], whole[-n_bytes:]
    return content if seal == SEAL and hashlib.sha256(content).digest() == digest else None
