"""Damage by chance, the same for the same seed: of bytes, of text, and of the values that tables and JSON hold."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

TOKENS = (
    *(b"", b"nan", b"NaN", b"inf", b"-inf", b"-1", b"0", b"1e999", b"1e-400", b"99999999999999999999", b"0x10", b"1_0"),
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b'"',
        b"'",
        b"\x00",
        b"\r",
        b"\n",
        b",",
        b":",
        b"..",
        b"/",
        b"=1+1",
        b"%s",
    ),
    *(
        "ü".encode(),
        "𝟙".encode(),
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"a" * 5_000,
        b"[" * 2_000,
        b"&a",
        b"*a",
        b"!!python/x",
    ),
)
"""What breaks readers: no value, no number, too large, other types, separators, half characters, deep nesting."""


def budget(usual: int) -> int:
    """How many cases a loop runs: more with MUTATIONS=10 in the environment (ten times as many)."""
    return int(usual * float(os.environ.get("MUTATIONS", "1")))


def mutations(content: bytes, n: int, seed: int) -> Iterator[bytes]:
    """`n` damaged versions of the content, none equal to it."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < n:
        damaged = KINDS[int(rng.integers(len(KINDS)))](content, rng)
        if damaged != content:
            made += 1
            yield damaged


def flip_bit(content: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    if damaged:
        damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def truncate(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def cut_out(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content) + 1))
    return content[:start] + content[start + int(rng.integers(1, 60)) :]


def double(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content) + 1))
    part = content[start : start + int(rng.integers(1, 200))]
    return content[:start] + part * int(rng.integers(2, 4)) + content[start + len(part) :]


def put_token(content: bytes, rng: np.random.Generator) -> bytes:
    """In place of the text between two separators, as a value is."""
    token = TOKENS[int(rng.integers(len(TOKENS)))]
    places = [i for i, byte in enumerate(content[:200_000]) if byte in b',:\n []{}="<>']
    if len(places) < 2:
        return content + token
    i = int(rng.integers(len(places) - 1))
    return content[: places[i] + 1] + token + content[places[i + 1] :]


def swap_lines(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    i, j = rng.integers(len(lines), size=2).tolist()
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def drop_line(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    del lines[int(rng.integers(len(lines)))]
    return b"\n".join(lines)


KINDS = (flip_bit, truncate, cut_out, double, put_token, put_token, put_token, swap_lines, drop_line)
