"""What is in a tar file and where, read from its headers alone; strict, because every byte may be hostile.

Nothing is ever extracted. Formats: POSIX (ustar, pax) and GNU; not compressed.
Source: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
from typing import NamedTuple

_BLOCK = 512
_LONGEST_NAME = 1 << 16
_LONGEST_EXTENSION = 1 << 20
_REGULAR = b"07\0"
_WITHOUT_DATA = b"123456"
_SIGNS_OF_COMPRESSION = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    name: str
    offset: int
    """Of its data in the file."""
    size: int


class Damage(Exception):
    """Why a file cannot be read to its end as a tar file."""


def scan(path: str) -> tuple[list[Member], str]:
    """The regular members of a file in their order, and what is wrong from some place on ("" if nothing is).

    Links, devices, folders and sparse members are left out.

    Raises:
        OSError: the file cannot be read.
    """
    members: list[Member] = []
    with open(path, "rb", buffering=0) as file:
        try:
            _scan(file.fileno(), os.fstat(file.fileno()).st_size, members)
        except Damage as e:
            return members, str(e)
    return members, ""


def _scan(descriptor: int, file_size: int, members: list[Member]) -> None:
    at, name, size_of_next = 0, "", None
    while True:
        header = os.pread(descriptor, _BLOCK, at)
        if at == 0:
            for sign, compression in _SIGNS_OF_COMPRESSION.items():
                if header.startswith(sign):
                    raise Damage(f"compressed with {compression}: decompress it, images are compressed already")
        if len(header) < _BLOCK:
            raise Damage(f"cut short at byte {at}: the mark at the end of the archive is missing")
        if not any(header):
            return
        kind, size = header[156:157], _number(header[124:136], at)
        _check(header, at)
        if kind == b"S":  # sparse in the old way of GNU: more headers may follow
            at = _after_sparse_headers(descriptor, header, at)
        start = at + _BLOCK
        if kind in _REGULAR and size_of_next is not None:
            size = size_of_next
        if kind in _WITHOUT_DATA:
            size = 0
        if start + size > file_size:
            raise Damage(f"cut short: the member at byte {at} ends at {start + size}, the file at {file_size}")
        if kind == b"L":
            name = (
                _text(descriptor, start, size, _LONGEST_NAME, at).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            )
        elif kind == b"x":
            records = _records(_text(descriptor, start, size, _LONGEST_EXTENSION, at), at)
            name = records.get(b"path", name.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
            size_of_next = _decimal(records[b"size"], at) if b"size" in records else None
            if any(key.startswith(b"GNU.sparse.") for key in records):
                size_of_next = -1
        elif kind not in (b"K", b"g"):
            if kind in _REGULAR:
                if size < 0:
                    size = _number(header[124:136], at)  # sparse: not the bytes of an image file
                else:
                    members.append(Member(name or _short_name(header), start, size))
            name, size_of_next = "", None
        at = start + -(-size // _BLOCK) * _BLOCK


def _check(header: bytes, at: int) -> None:
    """The sum of a header's bytes, its own field counted as spaces; old writers summed signed bytes."""
    try:
        expected = int(header[148:156].split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        expected = -1
    rest = header[:148] + b" " * 8 + header[156:]
    if expected not in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest)):
        raise Damage(f"no tar header at byte {at}")


def _number(field: bytes, at: int) -> int:
    if field[0] & 0x80:  # base 256, for more than 8 GiB
        number = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40 or number >> 62:
            raise Damage(f"impossible size at byte {at}")
        return number
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):  # int() would take a sign, too, and a negative size leads back to where we are
        raise Damage(f"no tar header at byte {at}")
    return int(digits or b"0", 8)


def _decimal(text: bytes, at: int) -> int:
    if not text.isdigit() or len(text) > 18:
        raise Damage(f"impossible size at byte {at}")
    return int(text)


def _text(descriptor: int, start: int, size: int, longest: int, at: int) -> bytes:
    if size > longest:
        raise Damage(f"extended header of {size} bytes at byte {at}: more than {longest}")
    return os.pread(descriptor, size, start)


def _records(text: bytes, at: int) -> dict[bytes, bytes]:
    """Lines of "length key=value\\n"."""
    records = {}
    while text.strip(b"\0"):
        length_text, space, _ = text.partition(b" ")
        length = _decimal(length_text, at) if space else 0
        record = text[len(length_text) + 1 : length - 1]
        if (
            length <= len(length_text) + 1
            or length > len(text)
            or text[length - 1 : length] != b"\n"
            or b"=" not in record
        ):
            raise Damage(f"broken extended header at byte {at}")
        key, _, value = record.partition(b"=")
        records[key] = value
        text = text[length:]
    return records


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU has other things at the place of the prefix
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _after_sparse_headers(descriptor: int, header: bytes, at: int) -> int:
    is_extended = header[482]
    while is_extended:
        at += _BLOCK
        header = os.pread(descriptor, _BLOCK, at)
        if len(header) < _BLOCK:
            raise Damage(f"cut short at byte {at}")
        is_extended = header[504]
    return at
