"""How many values a Parquet file unpacks to, before a library unpacks any of them.

Repeated values take no room in Parquet: a file of 2 kB can hold 20 GB of them. Only the headers of its pages say so,
which pyarrow shows nobody; the sums in the footer may lie, and asking pyarrow for those of a column ends the program
where a footer is damaged. Footer and page headers are structures in Thrift's compact protocol, of which this reads what
it needs (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md, and the field numbers in
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"PAR1"
PAGE_HEADER_BYTES = 1 << 16
"""Read at a time: a header has some tens of bytes, and two values of the column in its statistics."""
DEEPEST = 24

ROW_GROUPS, COLUMNS, META_DATA = 4, 1, 3
PATH, VALUES, PACKED, DATA_PAGE, DICTIONARY_PAGE = 3, 5, 7, 9, 11
PACKED_PAGE, KINDS_OF_PAGE, VALUES_OF_PAGE = 3, (5, 7, 8), 1


class DamagedError(ValueError):
    """The bytes are no structure of this protocol, or lack what they must have."""


@dataclass
class Bytes:
    """Bytes that are read from the front."""

    content: bytes
    place: int = 0

    def take(self, n: int) -> bytes:
        if not 0 <= n <= len(self.content) - self.place:
            raise DamagedError("ends too early")
        self.place += n
        return self.content[self.place - n : self.place]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise DamagedError("a number of more than 64 bits")

    def whole(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Field number -> value."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.whole()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self.value(kind, depth + 1)
        return fields

    def value(self, kind: int, depth: int) -> Any:
        if depth > DEEPEST:
            raise DamagedError("nested too deeply")
        if kind in (1, 2, 3):
            return self.take(1)[0]
        if kind in (4, 5, 6):
            return self.whole()
        if kind == 7:
            return struct.unpack("<d", self.take(8))[0]
        if kind == 8:
            return self.take(self.varint())
        if kind in (9, 10):
            return self.elements(depth)
        if kind == 12:
            return self.struct(depth)
        raise DamagedError(f"a value of kind {kind}")  # no maps in Parquet's structures

    def elements(self, depth: int) -> list[Any]:
        head = self.take(1)[0]
        n = self.varint() if head >> 4 == 15 else head >> 4
        if n > len(self.content) - self.place:  # each takes a byte at least
            raise DamagedError("ends too early")
        return [self.value(head & 15, depth + 1) for _ in range(n)]


def values_of(path: Path, column: str) -> list[int]:
    """For each group of rows how many values of `column` its pages say they hold.

    Raises:
        DamagedError: footer or page headers are not what they must be.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        footer = _footer(file)
        found = []
        for group in _list(footer, ROW_GROUPS):
            n = 0
            for chunk in _list(group, COLUMNS):
                about = chunk.get(META_DATA) if isinstance(chunk, dict) else None
                parts = about.get(PATH) if isinstance(about, dict) else None
                if about is None or not isinstance(parts, list) or not parts:
                    raise DamagedError("a column without a name")
                if parts[0] == column.encode():
                    n += max(_number(about, VALUES), sum(_pages(file, about)))
            found.append(n)
        return found


def _footer(file: BinaryIO) -> dict[int, Any]:
    end = file.seek(0, 2)
    file.seek(max(0, end - 8))
    tail = file.read(8)
    n = int.from_bytes(tail[:4], "little")
    if len(tail) < 8 or tail[4:] != MAGIC or n > end - 12:
        raise DamagedError("no footer")
    file.seek(end - 8 - n)
    return Bytes(file.read(n)).struct()


def _pages(file: BinaryIO, about: dict[int, Any]) -> Iterator[int]:
    """Values of each page of a column's chunk; of dictionaries too, which are few."""
    place = _number(about, DATA_PAGE)
    if 0 < about.get(DICTIONARY_PAGE, 0) < place:
        place = about[DICTIONARY_PAGE]
    end = place + _number(about, PACKED)
    while place < end:
        file.seek(place)
        head = Bytes(file.read(PAGE_HEADER_BYTES))
        page = head.struct()
        place += head.place + _number(page, PACKED_PAGE)
        for kind in KINDS_OF_PAGE:
            if isinstance(page.get(kind), dict):
                yield _number(page[kind], VALUES_OF_PAGE)


def _list(fields: Any, number: int) -> list[Any]:
    found = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(found, list):
        raise DamagedError(f"field {number} is no list")
    return found


def _number(fields: dict[int, Any], number: int) -> int:
    found = fields.get(number)
    if type(found) is not int or found < 0:
        raise DamagedError(f"field {number} is no number from 0")
    return found
